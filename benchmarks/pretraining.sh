#!/usr/bin/env bash
# P2's table 1 (arXiv 2411.16205) and P1's figure 4 (arXiv 2404.15045) at some 5M parameters: five models of the same
# multiply-adds, three seeds. The usual initializer_range, 0.02 at P2's 768, grows as the root of the width falls.
#
#     benchmarks/pretraining.sh NAME OUTPUT --train_file books.jsonl --validation_file more_books.jsonl
#     benchmarks/pretraining.sh NAME OUTPUT --train_file german.jsonl greek.jsonl ...   # equal shares of each
#
# Further options are those of mhmoe pretrain. The same command goes on where an earlier one stopped. Table, curves and
# figures are copied to benchmarks/results/NAME.*.
set -euo pipefail

name=$1
output=$2
shift 2

mhmoe compare --output_dir "$output" \
    --models p2-dense p2-smoe p2-fine-grained p2-mhmoe-head2 p2-mhmoe-head3 --seeds 1 2 3 \
    --config_overrides hidden_size=168,num_hidden_layers=4,tie_word_embeddings=true,initializer_range=0.043 \
    --vocab_size 4096 --block_size 128 --per_device_train_batch_size 8 --num_train_tokens 358400 \
    --learning_rate 2e-3 --max_eval_samples 160 --per_device_eval_batch_size 16 --eval_steps 0.125 --save_steps 0.25 \
    --document_characters 10000 --logging_steps 40 --report_to none "$@"

results=$(dirname "$0")/results
for kind in json png; do
    cp "$output/comparison.$kind" "$results/$name.$kind"
done
sed "s/(comparison.png)/($name.png)/" "$output/comparison.md" > "$results/$name.md"
