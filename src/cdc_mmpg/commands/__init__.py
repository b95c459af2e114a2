"""Commands of `cdc-mmpg`: their variables, the plan of programs, and its execution."""
