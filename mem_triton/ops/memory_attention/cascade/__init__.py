"""Memory merged by log-sum-exp into attention over the context, which another kernel has done."""
