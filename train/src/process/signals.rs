//! SIGINT and SIGTERM: the first asks for a good end, the second ends at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

/// A signal that asked the program to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Ctrl-C.
    Interrupt,
    /// `kill`, or the end of a session.
    Terminate,
}

impl Signal {
    /// Exit code of a program that ended because of it.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Interrupt => 128 + SIGINT,
            Self::Terminate => 128 + SIGTERM,
        }
    }
}

/// Watches for signals.
#[derive(Clone, Debug)]
pub struct Signals {
    seen: Arc<AtomicUsize>,
}

impl Signals {
    /// Takes over both signals for the rest of the process.
    pub fn install() -> std::io::Result<Self> {
        let seen = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        for (signal, kind) in [(SIGINT, Signal::Interrupt), (SIGTERM, Signal::Terminate)] {
            // Registered before what sets the flag, so that it sees only the flag of an earlier signal.
            flag::register_conditional_shutdown(signal, kind.exit_code(), again.clone())?;
            flag::register(signal, again.clone())?;
            flag::register_usize(signal, seen.clone(), signal as usize)?;
        }
        Ok(Self { seen })
    }

    /// The signal that came, if one did.
    pub fn requested(&self) -> Option<Signal> {
        match self.seen.load(Ordering::Relaxed) as i32 {
            0 => None,
            SIGINT => Some(Signal::Interrupt),
            _ => Some(Signal::Terminate),
        }
    }
}
