#!/bin/sh
# Compensation of smollm2 at 105.8 M parameters (docs/recovery.md): four trainings, fifteen to twenty-five minutes each on two cores.
#
#     DATA=FOLDER OUT=WHERE sh experiments/recovery.sh && python benchmarks/recovery_table.py WHERE
#
# FOLDER holds wikitext2_raw/wiki.valid.raw, wikitext2_raw/wiki.test.raw, ptb/ptb.valid.txt, alpaca/random_9k.json, arc_easy and piqa (not part
# of this repository). What is there already is not made again, and an interrupted training goes on. Run it alone: other work makes it slow.
set -eu
export TQDM_DISABLE=1
WIKI=$DATA/wikitext2_raw/wiki.valid.raw
DRAW="--data $WIKI --seq-len 512 --seed 0 --dtype bfloat16"
TRAIN="--preset quick --resume --data $DATA/alpaca/random_9k.json,$WIKI"

compress() { [ -d "$OUT/$1" ] || grasp compress smollm2 "$OUT/$1" $DRAW --quiet $2; }
recover() { [ -d "$OUT/$2" ] || grasp recover "$OUT/$1" "$OUT/$2" $TRAIN --quiet $3; }

compress removed "--method shortgpt --num-layers 9 --num-samples 32"
compress grasp "--method grasp --num-layers 9 --retain-ratio 0.1 --num-samples 32"
compress grasp-fisher "--ratio 0.2134"
recover grasp grasp-distill "--max-steps 220 --eval-every 55"
recover grasp grasp-lm "--max-steps 220 --eval-every 55 --objective lm"
recover removed removed-lora-lm "--max-steps 220 --eval-every 55 --objective lm --train lora"
# 80 M trained numbers: fewer steps, since each takes twice as long (the preset makes them small ones)
recover grasp-fisher grasp-fisher-distill "--max-steps 80 --eval-every 20"

for name in removed grasp grasp-fisher removed-lora-lm grasp-lm grasp-distill grasp-fisher-distill; do
  [ -f "$OUT/$name.json" ] || grasp eval "$OUT/$name" --dtype bfloat16 --ppl "$DATA/wikitext2_raw/wiki.test.raw,$DATA/ptb/ptb.valid.txt" \
    --seq-len 512 --num-blocks 24 --tasks arc_easy,piqa --task-data "$DATA" --limit 150 --quiet -o "$OUT/$name.json"
done
[ -f "$OUT/dense.json" ] || grasp eval smollm2 --dtype bfloat16 --ppl "$DATA/wikitext2_raw/wiki.test.raw,$DATA/ptb/ptb.valid.txt" \
  --seq-len 512 --num-blocks 24 --tasks arc_easy,piqa --task-data "$DATA" --limit 150 --quiet -o "$OUT/dense.json"
