#!/usr/bin/env bash
# Table 7: parameters, measured memory and seconds of Stage 2 per client.  bash launch/tables/table_07.sh [full|mini|demo]
# Memory and seconds are those of a whole process: one at a time, whatever the size. (In all_demo.sh there are two.)
export JOBS=${JOBS:-1}
source "$(dirname "$0")/common.sh"
need flava tap
need flava fedavg
need vilt tap
need vilt fedavg
report
