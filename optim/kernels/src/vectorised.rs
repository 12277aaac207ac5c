//! Loops compiled for the vectors of the processor at hand.

use pulp::{Arch, NullaryFnOnce};

/// Runs a loop compiled for the widest vectors that this processor has.
///
/// The closure must be `#[inline(always)]`: a closure that stays a function of its own is compiled for the oldest processors, where a fused
/// multiplication and addition is a call, and so is rounding.
#[inline]
pub fn vectorised<R>(run: impl FnMut() -> R) -> R {
    struct Run<F>(F);
    // Called by reference: to call it once and for all goes through a function of the compiler's that is inlined or not.
    impl<R, F: FnMut() -> R> NullaryFnOnce for Run<F> {
        type Output = R;
        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Run(run))
}
