//! Signals that ask a program to end: the first requests an orderly end, the second ends it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

#[cfg(unix)]
use signal_hook::consts::SIGHUP;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// Signal that asks the program to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// `kill`, or the end of a batch job.
    Terminate,
    /// The end of the terminal or of the connection.
    HangUp,
}

impl Signal {
    /// All signals watched on this system.
    const ALL: &[Self] = if cfg!(unix) {
        &[Self::Interrupt, Self::Terminate, Self::HangUp]
    } else {
        &[Self::Interrupt, Self::Terminate]
    };

    /// Signal number of the system.
    pub fn number(self) -> i32 {
        match self {
            Self::Interrupt => SIGINT,
            Self::Terminate => SIGTERM,
            #[cfg(unix)]
            Self::HangUp => SIGHUP,
            #[cfg(not(unix))]
            Self::HangUp => 1,
        }
    }

    /// Signal with this number, if it is watched.
    pub fn of_number(number: i32) -> Option<Self> {
        Self::ALL.iter().copied().find(|signal| signal.number() == number)
    }

    /// Exit code of a program ended by this signal.
    pub fn exit_code(self) -> i32 {
        128 + self.number()
    }
}

/// Watches for signals.
#[derive(Clone, Debug)]
pub struct Signals {
    seen: Arc<AtomicUsize>,
}

impl Signals {
    /// Takes over the signals until the process ends. An ignored signal, such as SIGHUP under `nohup`, stays ignored.
    pub fn install() -> std::io::Result<Self> {
        let seen = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        for signal in Signal::ALL.iter().filter(|signal| !is_ignored(**signal)) {
            let number = signal.number();
            // Registered before the handler that sets the flag, so that it sees only the flag of an earlier signal.
            flag::register_conditional_shutdown(number, signal.exit_code(), again.clone())?;
            flag::register(number, again.clone())?;
            flag::register_usize(number, seen.clone(), number as usize)?;
        }
        Ok(Self { seen })
    }

    /// Received signal, if any.
    pub fn requested(&self) -> Option<Signal> {
        Signal::of_number(self.seen.load(Ordering::Relaxed) as i32)
    }
}

/// Returns true if the process was started with a signal ignored.
#[cfg(unix)]
fn is_ignored(signal: Signal) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only queries, and the kernel fills the structure, for which all bits zero are valid.
    unsafe {
        libc::sigaction(signal.number(), std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(not(unix))]
fn is_ignored(_signal: Signal) -> bool {
    false
}

/// Sends a signal to a process; false if there is no such process or the system has no such signals.
pub fn send(process: u32, signal: Signal) -> bool {
    #[cfg(unix)]
    // SAFETY: `kill` accepts any numbers and touches no memory.
    return unsafe { libc::kill(process as i32, signal.number()) == 0 };
    #[cfg(not(unix))]
    {
        let _ = (process, signal);
        false
    }
}
