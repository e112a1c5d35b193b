#!/usr/bin/env bash
# Table 6: Stage 2 with and without distillation, text tasks.  bash launch/tables/table_06.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need vilt tap
report
