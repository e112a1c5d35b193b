#!/usr/bin/env bash
# Table 12: margins, FLAVA, image tasks.  bash launch/tables/table_12.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
report
