//! Initialisations of the two factors of LoRA and its relatives.
//!
//! By default A is uniform between plus and minus `1 / sqrt(d_in)`, and B zero. If the factors start as part of the weight, that product is
//! subtracted from the base while the adapter runs ([`Adapter::origin`]): the weight is never changed, and the layer starts as it was.
//!
//! To add one, write its file and a line in [`INITS`].
//!
//! [`Adapter::origin`]: crate::Adapter::origin

use super::gaussian::GAUSSIAN;
use super::olora::OLORA;
use super::orthogonal::ORTHOGONAL;
use super::pissa::PISSA;
use super::random::RANDOM;
use super::start::{FactorInit, Start};
use crate::ground::error::AdapterError;
use crate::ground::initialisation::Initialisation;
use crate::ground::site::{Place, Site};

const INITS: [&FactorInit; 5] = [&GAUSSIAN, &RANDOM, &ORTHOGONAL, &OLORA, &PISSA];

/// Supported initialisations of two-factor structures in addition to the default.
pub(crate) const OF_FACTORS: &[&Initialisation] = &abouts(INITS);

/// Those that leave the base weight as it is.
pub(crate) const BESIDE_THE_WEIGHT: &[&Initialisation] = &abouts([&GAUSSIAN, &RANDOM, &ORTHOGONAL]);

const fn abouts<const N: usize>(inits: [&'static FactorInit; N]) -> [&'static Initialisation; N] {
    let mut abouts = [&GAUSSIAN.about; N];
    let mut index = 0;
    while index < N {
        abouts[index] = &inits[index].about;
        index += 1;
    }
    abouts
}

fn of(place: &Place) -> Option<&'static FactorInit> {
    INITS.into_iter().find(|init| init.about.name == place.init)
}

pub(crate) fn check(place: &Place) -> Result<(), String> {
    of(place).map_or(Ok(()), |init| (init.check)(place))
}

/// Initial values of the factors of this layer; empty if a file has them.
pub(crate) fn start(site: &Site<'_>) -> Result<Start, AdapterError> {
    if site.is_given() {
        return Ok(Start::default());
    }
    let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
    if site.place.embedding {
        // As in peft, whatever the initialisation of the other layers: rows that are never looked up stay as they are.
        return Ok(Start { a: vec![0.0; d_in * rank], b: site.normal("b", rank * d_out, 1.0) });
    }
    Ok(match of(site.place) {
        Some(init) => (init.start)(site),
        None => Start { a: site.uniform("a", d_in * rank, (d_in as f64).sqrt().recip()), b: vec![0.0; rank * d_out] },
    })
}
