#!/usr/bin/env bash
# Table 10: TAP against 2P iterations of post-training, text tasks.  bash launch/tables/table_10.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need flava disentafl
need vilt tap
need vilt disentafl
report
