//! Initialisation `random`.

use super::start::{FactorInit, Start};
use crate::ground::initialisation::Initialisation;

/// Both factors uniform, which changes the initial output.
pub(super) const RANDOM: FactorInit = FactorInit {
    about: Initialisation {
        changes_output: true,
        ..Initialisation::plain(
            "random",
            "A and B uniform between plus and minus 1 / sqrt(d_in) and 1 / sqrt(r); changes the output, for experiments",
            &[],
        )
    },
    check: |_| Ok(()),
    start: |site| {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        Start {
            a: site.uniform("a", d_in * rank, (d_in as f64).sqrt().recip()),
            b: site.uniform("b", rank * d_out, (rank as f64).sqrt().recip()),
        }
    },
};
