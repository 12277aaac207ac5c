//! The program `lowrank`.

use std::process::ExitCode;

use lowrank_train::run::BlockAllocator;

#[global_allocator]
static ALLOCATOR: BlockAllocator = BlockAllocator;

fn main() -> ExitCode {
    lowrank_train::cli::main()
}
