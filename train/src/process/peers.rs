//! Processes that train one model together, started by an MPI launcher.
//!
//! Sums are taken in the order of the ranks, whatever the machine: `n` processes get the bits that one process gets
//! by accumulating over `n` micro-batches.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
#[cfg(feature = "mpi")]
use std::time::Instant;

#[cfg(feature = "mpi")]
use mpi::environment::Universe;
#[cfg(feature = "mpi")]
use mpi::topology::SimpleCommunicator;
#[cfg(feature = "mpi")]
use mpi::traits::{Communicator, CommunicatorCollectives, Equivalence, Root};

/// This process among those that train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peers {
    rank: usize,
    size: usize,
}

/// Bytes sent and time spent by sums of gradients and by updated weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes that this process has sent.
    pub sent: u64,
    /// Nanoseconds in this, waiting for other processes included.
    pub nanoseconds: u64,
}

static SENT: AtomicU64 = AtomicU64::new(0);
static NANOSECONDS: AtomicU64 = AtomicU64::new(0);

/// Launch that this build or its MPI library does not support.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// Build without MPI that was started as one of several processes.
    #[error(
        "{variable} = {size}: started as one of {size} processes, but this build has no MPI; build with `--features mpi`, or start one process without mpirun or srun"
    )]
    NoMpi {
        /// Variable that the launcher set.
        variable: &'static str,
        /// Number of processes.
        size: usize,
    },
    /// MPI library that does not know the launcher.
    #[error(
        "{variable} = {size}: started as one of {size} processes, of which the MPI library of this build sees {seen}; use the mpirun of that library, or `srun --mpi=pmix`"
    )]
    OtherLauncher {
        /// Variable that the launcher set.
        variable: &'static str,
        /// Number of processes.
        size: usize,
        /// Number of processes in the library's world.
        seen: usize,
    },
    /// Command that does not train.
    #[error(
        "{variable} = {size}: only pretrain and finetune run as several processes; start one without mpirun or srun"
    )]
    OneProcess {
        /// Variable that the launcher set.
        variable: &'static str,
        /// Number of processes.
        size: usize,
    },
    /// MPI library that is already initialised.
    #[error("MPI is initialised already, or was finalized before")]
    Initialised,
}

/// Variables in which launchers state the number of processes. A batch script of SLURM runs once, and knows the
/// number of tasks too: only a step of `srun` has its own number.
const LAUNCHERS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

static PEERS: OnceLock<Peers> = OnceLock::new();

/// Variable and number of processes, if a launcher started more than one.
fn launched() -> Option<(&'static str, usize)> {
    let size = |variable| std::env::var(variable).ok()?.parse::<usize>().ok();
    LAUNCHERS.into_iter().find_map(|variable| Some((variable, size(variable)?))).filter(|(_, size)| *size > 1)
}

/// Connection to the other processes, until dropped.
pub struct Session {
    peers: Peers,
    #[cfg(feature = "mpi")]
    _universe: Option<Universe>,
}

impl Session {
    /// Connects to the other processes, if a launcher started any; `trains` is false for a command that cannot share
    /// its work.
    pub fn begin(trains: bool) -> Result<Self, PeersError> {
        let alone = Peers { rank: 0, size: 1 };
        let Some((variable, size)) = launched() else {
            return Ok(Self {
                peers: alone,
                #[cfg(feature = "mpi")]
                _universe: None,
            });
        };
        if !trains {
            return Err(PeersError::OneProcess { variable, size });
        }
        Self::connect(variable, size)
    }

    #[cfg(not(feature = "mpi"))]
    fn connect(variable: &'static str, size: usize) -> Result<Self, PeersError> {
        Err(PeersError::NoMpi { variable, size })
    }

    #[cfg(feature = "mpi")]
    fn connect(variable: &'static str, size: usize) -> Result<Self, PeersError> {
        let started = mpi::initialize_with_threading(mpi::Threading::Funneled);
        let (universe, _) = started.ok_or(PeersError::Initialised)?;
        let world = universe.world();
        let peers = Peers { rank: world.rank() as usize, size: world.size() as usize };
        if peers.size != size {
            return Err(PeersError::OtherLauncher { variable, size, seen: peers.size });
        }
        let peers = *PEERS.get_or_init(|| peers);
        Ok(Self { peers, _universe: Some(universe) })
    }

    /// The processes.
    pub fn peers(&self) -> Peers {
        self.peers
    }
}

impl Peers {
    /// Processes that the [`Session`] of this process is connected to; this one alone without a session.
    pub fn of_process() -> Self {
        PEERS.get().copied().unwrap_or(Self { rank: 0, size: 1 })
    }

    /// Number of this process, counted from 0.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn size(self) -> usize {
        self.size
    }

    /// Returns true if there are no others.
    pub fn is_alone(self) -> bool {
        self.size == 1
    }

    /// Returns true if this process writes files and reports for all.
    pub fn is_first(self) -> bool {
        self.rank == 0
    }

    /// Lets the first process work before the others do the same, which then find its files.
    pub fn first_before_others<R, E>(self, work: impl FnOnce() -> Result<R, E>) -> Result<R, E> {
        if !self.is_first() {
            self.wait();
            return work();
        }
        let done = work()?;
        self.wait();
        Ok(done)
    }
}

#[cfg(feature = "mpi")]
impl Peers {
    /// Values of all processes in the order of the ranks; each has as many.
    fn gather<T: Equivalence + Copy>(self, values: &[T]) -> Vec<T> {
        let mut all = values.repeat(self.size);
        if !self.is_alone() {
            SimpleCommunicator::world().all_gather_into(values, &mut all[..]);
        }
        all
    }

    /// Waits until all processes are here.
    pub fn wait(self) {
        if !self.is_alone() {
            SimpleCommunicator::world().barrier();
        }
    }

    /// Ends all processes with an exit code.
    pub fn abort(self, code: i32) {
        if !self.is_alone() {
            SimpleCommunicator::world().abort(code);
        }
    }

    /// Sums the values of all processes in the order of the ranks: each receives a part of everybody's, adds it up and
    /// sends the sum to all.
    pub fn sum(self, values: Vec<f32>) -> Vec<f32> {
        if self.is_alone() {
            return values;
        }
        let begin = Instant::now();
        let (count, part) = (values.len(), values.len().div_ceil(self.size));
        let mut values = values;
        values.resize(part * self.size, 0.0);
        let mut parts = vec![0.0f32; values.len()];
        let world = SimpleCommunicator::world();
        world.all_to_all_into(&values[..], &mut parts[..]);
        let (sums, others) = parts.split_at_mut(part);
        for other in others.chunks_exact(part.max(1)) {
            sums.iter_mut().zip(other).for_each(|(sum, value)| *sum += value);
        }
        world.all_gather_into(&*sums, &mut values[..]);
        values.truncate(count);
        self.count_traffic(sum_bytes(count as u64, self.size as u64), begin.elapsed());
        values
    }

    /// Adds bytes that this process has sent, and the time that it took.
    pub(super) fn count_traffic(self, sent: u64, time: std::time::Duration) {
        SENT.fetch_add(sent, Ordering::Relaxed);
        NANOSECONDS.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Text of the first process.
    pub fn of_first(self, text: &str) -> String {
        if self.is_alone() {
            return text.to_owned();
        }
        let root = SimpleCommunicator::world();
        let root = root.process_at_rank(0);
        let mut count = text.len() as u64;
        root.broadcast_into(&mut count);
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(count as usize, 0);
        root.broadcast_into(&mut bytes[..]);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(not(feature = "mpi"))]
impl Peers {
    fn gather<T: Clone>(self, values: &[T]) -> Vec<T> {
        values.to_vec()
    }

    /// Waits until all processes are here.
    pub fn wait(self) {}

    /// Ends all processes with an exit code.
    pub fn abort(self, _code: i32) {}

    /// Sums the values of all processes in the order of the ranks.
    pub fn sum(self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    /// Text of the first process.
    pub fn of_first(self, text: &str) -> String {
        text.to_owned()
    }
}

/// Bytes that each of `processes` sends to sum `values` of 4 bytes: a part of them to each other process, and its part of the sum to each.
pub fn sum_bytes(values: u64, processes: u64) -> u64 {
    2 * 4 * values.div_ceil(processes) * (processes - 1)
}

impl Peers {
    /// Traffic of all gradients and weights since the process began.
    pub fn traffic(self) -> Traffic {
        Traffic { sent: SENT.load(Ordering::Relaxed), nanoseconds: NANOSECONDS.load(Ordering::Relaxed) }
    }

    /// Numbers of each process in the order of the ranks.
    pub fn all(self, numbers: &[u64]) -> Vec<Vec<u64>> {
        self.gather(numbers).chunks(numbers.len().max(1)).map(<[u64]>::to_vec).collect()
    }

    /// Number pairs of each process in the order of the ranks; each has as many.
    pub fn all_pairs(self, pairs: &[[f64; 2]]) -> Vec<Vec<[f64; 2]>> {
        let all = self.gather(&pairs.concat());
        all.as_chunks().0.chunks(pairs.len().max(1)).map(<[[f64; 2]]>::to_vec).collect()
    }

    /// Sums counts of all processes.
    pub fn sum_counts(self, counts: &mut [u64]) {
        let all = self.all(counts);
        counts.iter_mut().enumerate().for_each(|(at, count)| *count = all.iter().map(|counts| counts[at]).sum());
    }

    /// Sums numbers of all processes in the order of the ranks.
    pub fn sum_numbers(self, numbers: &mut [f64]) {
        let all = self.gather(numbers);
        let count = numbers.len();
        for (at, number) in numbers.iter_mut().enumerate() {
            *number = all[at..].iter().step_by(count).copied().reduce(|sum, more| sum + more).unwrap_or(*number);
        }
    }

    /// Seconds of the first process, and the highest signal number that any has received.
    pub fn agree(self, seconds: f64, signal: i32) -> (f64, i32) {
        let all = self.gather(&[seconds, f64::from(signal)]);
        let signal = all.iter().skip(1).step_by(2).copied().fold(0.0, f64::max);
        (all[0], signal as i32)
    }
}
