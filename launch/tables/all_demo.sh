#!/usr/bin/env bash
# Every table and figure at demo size in OUT, and the sanity checks of configs/checks in OUT-checks: one to one and a
# half hours on two cores for one seed. `pip install -e '.[offline-metrics]'` first, for BERTScore without a network.
#
#   bash launch/tables/all_demo.sh
source "$(dirname "$0")/common.sh" demo
need_everything
report
runs=()
for check in homogeneous heterogeneous distillation margins; do
    for seed in $SEEDS; do runs+=("configs/checks/$check.py:seed=$seed" "check-$check-$seed"); done
done
OUT=$OUT-checks report
