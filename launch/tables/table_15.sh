#!/usr/bin/env bash
# Table 15: the standard backbone, FLAVA, image tasks.  bash launch/tables/table_15.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need_standard flava
report
