//! The program `lowrank`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lowrank_train::cli::main()
}
