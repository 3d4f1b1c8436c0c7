"""What several tests share: tiny models, records, short runs, broken inputs, and the processes that runs are made in."""
