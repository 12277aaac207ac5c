//! The program `lowrank`.

use std::process::ExitCode;

use lowrank_train::process::BlockAllocator;

#[global_allocator]
static ALLOCATOR: BlockAllocator = BlockAllocator;

fn main() -> ExitCode {
    lowrank_train::cli::main()
}
