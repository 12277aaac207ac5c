//! The process: its memory, its signals, its threads, its files and the devices it computes on.

mod allocator;
mod device;
pub mod files;
mod memory;
mod messages;
mod peers;
mod signals;

pub use allocator::BlockAllocator;
pub use device::{DeviceError, adapter_name, device, set_threads};
pub use memory::{MemoryUse, free_memory, machine_memory};
pub use messages::share_bytes;
pub use peers::{Peers, PeersError, Session, Traffic, sum_bytes};
pub use signals::{Signal, Signals, send};
