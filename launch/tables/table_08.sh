#!/usr/bin/env bash
# Table 8: TAP against 2P iterations of post-training, ViLT, image tasks.  bash launch/tables/table_08.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need vilt tap
need vilt disentafl
report
