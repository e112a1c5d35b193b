#!/usr/bin/env bash
# Table 2: FLAVA against the baselines, image tasks.  bash launch/tables/table_02.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need_all flava
report
