//! Initialisation `gaussian`.

use super::start::{FactorInit, Start};
use crate::ground::initialisation::Initialisation;

/// Description, for other structures of two factors too.
pub(crate) const ABOUT: Initialisation =
    Initialisation::plain("gaussian", "A normal with standard deviation 1 / r, B zero, as in peft", &[]);

/// A normal of deviation `1 / rank`, B zero, as `peft` names it.
pub(super) const GAUSSIAN: FactorInit = FactorInit {
    about: ABOUT,
    check: |_| Ok(()),
    start: |site| {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        Start { a: site.normal("a", d_in * rank, (rank as f64).recip()), b: vec![0.0; rank * d_out] }
    },
};
