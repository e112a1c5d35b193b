#!/usr/bin/env bash
# Table 13: margins, text tasks; and Figures 3 and 4.  bash launch/tables/table_13.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need vilt tap
report
