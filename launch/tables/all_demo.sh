#!/usr/bin/env bash
# Every table and figure at demo size, and the sanity checks of configs/checks: under an hour on two cores.
#
#   bash launch/tables/all_demo.sh
source "$(dirname "$0")/common.sh" demo
need_everything
for check in homogeneous heterogeneous distillation margins; do
    runs+=("configs/checks/$check.py" "check-$check")
done
report
