//! Bytes from one process to others.

use super::Peers;

/// Most bytes of one message: MPI counts in 32 bits.
#[cfg(feature = "mpi")]
const PART: usize = 1 << 30;

#[cfg(feature = "mpi")]
impl Peers {
    /// Overwrites the bytes of all processes by those of one; all have as many.
    pub fn broadcast(self, from: usize, bytes: &mut [u8]) {
        use mpi::topology::SimpleCommunicator;
        use mpi::traits::{Communicator, Root};

        if self.is_alone() {
            return;
        }
        let begin = std::time::Instant::now();
        let world = SimpleCommunicator::world();
        let root = world.process_at_rank(from as i32);
        bytes.chunks_mut(PART).for_each(|part| root.broadcast_into(part));
        let sent = if from == self.rank() { bytes.len() as u64 * (self.size() as u64 - 1) } else { 0 };
        self.count_traffic(sent, begin.elapsed());
    }

    /// Sends bytes to the first process, which receives them with [`Peers::receive`].
    pub fn send_to_first(self, bytes: &[u8]) {
        use mpi::topology::SimpleCommunicator;
        use mpi::traits::{Communicator, Destination};

        if self.is_first() {
            return;
        }
        let world = SimpleCommunicator::world();
        let first = world.process_at_rank(0);
        first.send(&(bytes.len() as u64));
        bytes.chunks(PART).for_each(|part| first.send(part));
    }

    /// Next bytes that a process has sent to this one.
    pub fn receive(self, from: usize) -> Vec<u8> {
        use mpi::topology::SimpleCommunicator;
        use mpi::traits::{Communicator, Source};

        if from == self.rank() {
            return Vec::new();
        }
        let world = SimpleCommunicator::world();
        let source = world.process_at_rank(from as i32);
        let (len, _) = source.receive::<u64>();
        let mut bytes = vec![0; len as usize];
        bytes.chunks_mut(PART).for_each(|part| {
            source.receive_into(part);
        });
        bytes
    }
}

#[cfg(not(feature = "mpi"))]
impl Peers {
    /// Overwrites the bytes of all processes by those of one; all have as many.
    pub fn broadcast(self, _from: usize, _bytes: &mut [u8]) {}

    /// Sends bytes to the first process, which receives them with [`Peers::receive`].
    pub fn send_to_first(self, _bytes: &[u8]) {}

    /// Next bytes that a process has sent to this one.
    pub fn receive(self, _from: usize) -> Vec<u8> {
        Vec::new()
    }
}

/// Bytes that each of `processes` sends on average when every one has an equal part of `bytes` and sends it to all others.
pub fn share_bytes(bytes: u64, processes: u64) -> u64 {
    bytes.div_ceil(processes) * (processes - 1)
}
