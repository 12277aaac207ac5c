//! The instruction set that loops and products use.

use std::fmt;
use std::sync::OnceLock;

use thiserror::Error;

/// Environment variable that forces an instruction set: `avx2`, `avx512`, or `auto` for the best of the processor.
pub const VARIABLE: &str = "LOWRANK_SIMD";

/// Vector instructions of a processor, each set containing those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// Instructions of every processor of the architecture.
    Baseline,
    /// AVX2 with fused multiplication and addition, and conversions from f16.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl InstructionSet {
    /// Name in messages, files and `LOWRANK_SIMD`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The best set of this processor.
    pub fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            if has!("avx2") && has!("fma") && has!("f16c") {
                let wide = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
                return if wide { Self::Avx512 } else { Self::Avx2 };
            }
        }
        Self::Baseline
    }

    /// The set that a value of `LOWRANK_SIMD` names.
    pub fn requested(value: &str) -> Result<Self, InstructionSetError> {
        let best = Self::best();
        let set = match value {
            "" | "auto" => best,
            "avx2" => Self::Avx2,
            "avx512" => Self::Avx512,
            _ => return Err(InstructionSetError::Unknown(value.to_owned())),
        };
        if set > best { Err(InstructionSetError::Unsupported { asked: set, best }) } else { Ok(set) }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A value of `LOWRANK_SIMD` that is not supported.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum InstructionSetError {
    /// Names no instruction set.
    #[error("{VARIABLE} is {0:?}; allowed are auto, avx2 and avx512; unset it to use the best of this processor")]
    Unknown(String),
    /// Names instructions that would end the process.
    #[error("{VARIABLE} is {asked}, but the best set of this processor is {best}; unset it or set it to auto")]
    Unsupported {
        /// The set that was named.
        asked: InstructionSet,
        /// The best one here.
        best: InstructionSet,
    },
}

/// The instruction set of this process: the best of its processor unless `LOWRANK_SIMD` forces another.
///
/// Read once. A value that is not supported counts as `auto`; programs reject it with [`check_environment`] when they start.
#[inline]
pub fn instruction_set() -> InstructionSet {
    static SET: OnceLock<InstructionSet> = OnceLock::new();
    *SET.get_or_init(|| environment().unwrap_or_else(|_| InstructionSet::best()))
}

/// Rejects a value of `LOWRANK_SIMD` that is not supported.
pub fn check_environment() -> Result<(), InstructionSetError> {
    environment().map(drop)
}

fn environment() -> Result<InstructionSet, InstructionSetError> {
    InstructionSet::requested(&std::env::var_os(VARIABLE).unwrap_or_default().to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_unsupported_sets_are_rejected_with_the_cure() {
        let best = InstructionSet::best();
        assert_eq!(InstructionSet::requested("auto"), Ok(best));
        assert_eq!(InstructionSet::requested(""), Ok(best));
        for set in [InstructionSet::Avx2, InstructionSet::Avx512] {
            let asked = InstructionSet::requested(set.name());
            if set <= best {
                assert_eq!(asked, Ok(set));
            } else {
                assert_eq!(asked, Err(InstructionSetError::Unsupported { asked: set, best }));
            }
        }
        let error = InstructionSet::requested("AVX").unwrap_err().to_string();
        assert!(error.contains("\"AVX\"") && error.contains("auto, avx2 and avx512"), "{error}");
    }

    /// Runs the tests of this crate again, in a process for each other instruction set of the processor.
    #[test]
    fn all_tests_pass_under_every_instruction_set() {
        if std::env::var_os(VARIABLE).is_some() {
            return;
        }
        for set in [InstructionSet::Avx2, InstructionSet::Avx512] {
            if set >= InstructionSet::best() {
                continue;
            }
            let program = std::env::current_exe().unwrap();
            let output = std::process::Command::new(program).env(VARIABLE, set.name()).output().unwrap();
            assert!(output.status.success(), "{set}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }
}
