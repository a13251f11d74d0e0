"""What finished runs show: tables, statistics, verdicts on published claims."""
