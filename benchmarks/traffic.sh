#!/usr/bin/env bash
# The routing that benchmarks/traffic.py simulates with: two small models, trained with and without the load balancing
# loss. Minutes on a CPU.   bash benchmarks/traffic.sh TRAIN_FILE VALIDATION_FILE FOLDER
set -euo pipefail
train() {
    mhmoe pretrain --preset p2-mhmoe-head2 --vocab_size 2048 --train_file "$1" --validation_file "$2" --streaming \
        --config_overrides hidden_size=128,num_hidden_layers=2,num_attention_heads=4,decoder_sparse_step=1,\
num_moe_heads=8,num_experts=64,moe_intermediate_size=32 \
        --block_size 128 --max_steps 300 --per_device_train_batch_size 4 --eval_steps 300 --max_eval_samples 32 \
        --shuffle_buffer_size 4000 --report_to none "${@:3}"
}
train "$1" "$2" --output_dir "$3/balanced"
train "$1" "$2" --output_dir "$3/unbalanced" --no_output_router_logits
python benchmarks/traffic.py --models "$3/balanced" "$3/unbalanced" --text "$2"
