#!/usr/bin/env bash
# Table 1: ViLT against the baselines, image tasks.  bash launch/tables/table_01.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need_all vilt
report
