#!/usr/bin/env bash
# Table 11: margins, ViLT, image tasks.  bash launch/tables/table_11.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need vilt tap
report
