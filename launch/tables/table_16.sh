#!/usr/bin/env bash
# Table 16: the standard backbone, text tasks.  bash launch/tables/table_16.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need_standard flava
need vilt tap
need_standard vilt
report
