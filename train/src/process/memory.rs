//! Memory of this process.

use std::sync::atomic::{AtomicU64, Ordering};

use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System};

/// Resident memory of the process in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryUse {
    /// Current resident memory.
    pub rss: u64,
    /// Peak resident memory; if the system does not report it, the maximum seen by calls of [`MemoryUse::now`].
    pub peak: u64,
}

static SEEN: AtomicU64 = AtomicU64::new(0);

impl MemoryUse {
    /// Queries the system.
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").ok();
        let message = status.as_deref().and_then(parse_status).unwrap_or_else(|| {
            let rss = resident().unwrap_or(0);
            Self { rss, peak: rss }
        });
        // Linux counts lazily: the reported peak may be slightly below a value that it reported before.
        let most = message.peak.max(message.rss);
        Self { rss: message.rss, peak: SEEN.fetch_max(most, Ordering::Relaxed).max(most) }
    }
}

/// Memory of the machine with its swap space, or of the control group that limits this process, in bytes.
pub fn machine_memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    let machine = system.total_memory().saturating_add(system.total_swap());
    system.cgroup_limits().map_or(machine, |limits| machine.min(limits.total_memory.saturating_add(limits.free_swap)))
}

/// Memory that this process can still take without swapping: what is free in the machine, and in the control group that limits the process.
pub fn free_memory() -> u64 {
    let mut system = System::new();
    system.refresh_memory();
    let machine = system.available_memory();
    system.cgroup_limits().map_or(machine, |limits| machine.min(limits.free_memory))
}

fn resident() -> Option<u64> {
    let pid = sysinfo::get_current_pid().ok()?;
    let mut system = System::new();
    system.refresh_processes_specifics(
        ProcessesToUpdate::Some(&[pid]),
        true,
        ProcessRefreshKind::nothing().with_memory(),
    );
    Some(system.process(pid)?.memory())
}

fn parse_status(status: &str) -> Option<MemoryUse> {
    let kilobytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    Some(MemoryUse { rss: kilobytes("VmRSS:")? * 1024, peak: kilobytes("VmHWM:")? * 1024 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free_is_part_of_the_machine() {
        let free = free_memory();
        assert!(free > 0 && free <= machine_memory(), "{free}");
    }

    #[test]
    fn a_large_allocation_raises_the_peak() {
        let before = MemoryUse::now();
        let block = vec![1u8; 64 << 20];
        let during = MemoryUse::now();
        assert!(block.iter().all(|byte| *byte == 1));
        drop(block);
        assert!(during.rss >= before.rss + (60 << 20), "{before:?} {during:?}");
        assert!(MemoryUse::now().peak >= during.rss);
    }
}
