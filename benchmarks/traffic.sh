#!/usr/bin/env bash
# The routing that benchmarks/traffic.py simulates with: two small models, trained with and without the load balancing
# loss. Minutes on a CPU.   bash benchmarks/traffic.sh TRAIN_FILE VALIDATION_FILE FOLDER
set -euo pipefail
train() {
    mhmoe pretrain --preset p2-mhmoe-head2 --vocab_size 4096 --train_file "$1" --validation_file "$2" --streaming \
        --config_overrides hidden_size=192,num_hidden_layers=4,num_attention_heads=4,decoder_sparse_step=1,\
num_moe_heads=8,num_experts=64,moe_intermediate_size=48 \
        --block_size 256 --max_steps 300 --per_device_train_batch_size 8 --eval_steps 300 --max_eval_samples 32 \
        --report_to none --shuffle_buffer_size 4000 "${@:3}"
}
train "$1" "$2" --output_dir "$3/trained with the balancing loss"
train "$1" "$2" --output_dir "$3/trained without it" --no_output_router_logits
python benchmarks/traffic.py --models "$3/trained with the balancing loss" "$3/trained without it" --text "$2"
