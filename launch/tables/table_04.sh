#!/usr/bin/env bash
# Table 4: Stage 2 with and without distillation, ViLT, image tasks.  bash launch/tables/table_04.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need vilt tap
report
