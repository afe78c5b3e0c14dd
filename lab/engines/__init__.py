"""What the labs of other engines share: servers as processes, cases on scenes of them, a row for each case."""
