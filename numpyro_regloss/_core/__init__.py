# Copyright Contributors to the numpyro_regloss project.
# SPDX-License-Identifier: Apache-2.0
"""What every floor uses and no user sees: pytrees, checks, statistics, linear algebra, random numbers."""
