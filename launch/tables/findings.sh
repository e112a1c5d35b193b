#!/usr/bin/env bash
# The experiments behind launch/docs/findings.md: the demo with one thing changed at a time (for skewed labels the test
# sets, too), and what then is left of TAP's lead (findings.py beside this file).
#
#   SEEDS="51 52 53" bash launch/tables/findings.sh
source "$(dirname "$0")/common.sh" demo
variants="('tap','tap-stage2','tap-no-kd','fedavg+post','fedavg+2p')"
change() { # name fields
    local seed
    for seed in $SEEDS; do
        runs+=("configs/demo.py:variants=$variants,seed=$seed,$2" "change-$1-$seed")
    done
}
need flava tap # the demo unchanged
change rounds-14 rounds=14
change rounds-56 rounds=56
change post-steps-10 post_steps=10
change data-third data.train_size=300
change data-threefold data.train_size=2700
change skewed-labels federation.split=dirichlet,federation.alpha=0.1,data.test_split=personal
change margin-none margins=0.0
change margin-relative replacement.margin=relative,margins=0.05
change own-blocks-only replacement.scope=exclusive
change held-out-decides replacement.criterion=held_out,data.held_out=0.2
play
folders=()
for ((i = 1; i < ${#runs[@]}; i += 2)); do folders+=("$RUNS/${runs[i]}"); done
python launch/tables/findings.py "${folders[@]}" --out="$OUT"
