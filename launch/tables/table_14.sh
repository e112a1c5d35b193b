#!/usr/bin/env bash
# Table 14: the standard backbone, ViLT, image tasks.  bash launch/tables/table_14.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need vilt tap
need_standard vilt
report
