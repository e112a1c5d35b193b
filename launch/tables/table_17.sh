#!/usr/bin/env bash
# Table 17: where TAP is significantly better (Welch's t-test).  bash launch/tables/table_17.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need_all flava
need_all vilt
report
