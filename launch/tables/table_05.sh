#!/usr/bin/env bash
# Table 5: Stage 2 with and without distillation, FLAVA, image tasks.  bash launch/tables/table_05.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
report
