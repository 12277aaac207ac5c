//! Loops compiled for the vector instructions of the processor.

use pulp::{Arch, NullaryFnOnce};

use crate::instructions::{InstructionSet, instruction_set};

/// Runs a loop compiled for the widest vectors of [`instruction_set`].
///
/// The closure must be `#[inline(always)]`: a closure that stays a function of its own is compiled for the oldest processors, where a fused
/// multiplication and addition is a call, and so is rounding.
#[inline]
pub fn vectorised<R>(run: impl FnMut() -> R) -> R {
    struct Run<F>(F);
    // Called by reference: calling it by value goes through a compiler-generated function that may not be inlined.
    impl<R, F: FnMut() -> R> NullaryFnOnce for Run<F> {
        type Output = R;
        #[inline(always)]
        fn call(mut self) -> R {
            (self.0)()
        }
    }
    #[cfg(target_arch = "x86_64")]
    if instruction_set() == InstructionSet::Avx512 {
        // SAFETY: the processor has these instructions.
        return unsafe { with_avx512(run) };
    }
    Arch::new().dispatch(Run(run))
}

/// # Safety
///
/// The processor must have the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c")]
unsafe fn with_avx512<R>(mut run: impl FnMut() -> R) -> R {
    run()
}

/// Asks for memory that is going to be read; nothing is read yet.
#[inline(always)]
pub fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address reads nothing that the program sees.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
