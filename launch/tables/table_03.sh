#!/usr/bin/env bash
# Table 3: both models against the baselines, text tasks.  bash launch/tables/table_03.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need_all flava
need_all vilt
report
