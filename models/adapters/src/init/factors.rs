//! Initialisations of the two factors of LoRA and its relatives.
//!
//! - `default`: A uniform between plus and minus `1 / sqrt(d_in)`, B zero.
//! - `gaussian`: A normal of deviation `1 / rank`, B zero, as `peft` names it.
//! - `random`: A as in `default`, B uniform between plus and minus `1 / sqrt(rank)`; changes the initial output, for
//!   experiments only.
//! - `orthogonal`: factors from the halves of an orthogonal matrix, whose product is zero.
//! - `olora`: the QR factors of the weight ("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775).
//! - `pissa`: its leading singular part ("PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arXiv
//!   2404.02948).
//!
//! If the factors start as part of the weight, that product is subtracted from the base while the adapter runs ([`Adapter::origin`]): the weight is
//! never changed, and the layer starts as it was.
//!
//! [`Adapter::origin`]: crate::Adapter::origin

use super::olora::olora;
use super::orthogonal::orthogonal;
use super::pissa::pissa;
use super::start::Start;
use crate::ground::config::AdapterConfig;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};

/// Supported initialisations of two-factor structures in addition to the default.
pub(crate) const OF_FACTORS: &[&str] = &["gaussian", "random", "orthogonal", "olora", "pissa"];

/// Returns true if the factors start as part of the weight.
pub(crate) fn is_part_of_the_weight(init: &str) -> bool {
    matches!(init, "pissa" | "olora")
}

/// Returns true if the initialisation needs gradients of the base weights, see [`Attach::with_gradients`](crate::Attach::with_gradients).
pub fn asks_for_gradients(init: &str) -> bool {
    init == "lora-sb"
}

/// Option of initialisations that need gradients.
const FIRST_RATE: &str = "init_step_size";

/// Sets the initial step size of the configuration to the first learning rate of the run, if its initialisation uses
/// the first Adam step and no step size is given.
pub fn with_first_rate(config: AdapterConfig, rate: f64) -> AdapterConfig {
    match asks_for_gradients(&config.init) && !config.options.contains_key(FIRST_RATE) {
        true => config.with_option(FIRST_RATE, rate),
        false => config,
    }
}

/// Returns true if the initialisation changes the output of the layer.
pub fn leaves_the_base(init: &str) -> bool {
    matches!(init, "random" | "lora-sb" | "small_random")
}

pub(crate) fn check(place: &Place) -> Result<(), String> {
    match place.init.as_str() {
        "pissa" | "olora" => place.check_rank(),
        "orthogonal" if !place.rank.is_multiple_of(2) => {
            Err(format!("the orthogonal start needs an even rank, not {}", place.rank))
        }
        _ => Ok(()),
    }
}

/// Initial values of the factors of this layer; empty if a file has them.
pub(crate) fn start(site: &Site<'_>) -> Result<Start, AdapterError> {
    if site.is_given() {
        return Ok(Start::default());
    }
    let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
    let bound = (d_in as f64).sqrt().recip();
    let zero = vec![0.0; rank * d_out];
    Ok(match site.place.init.as_str() {
        "gaussian" => Start { a: site.normal("a", d_in * rank, (rank as f64).recip()), b: zero },
        "random" => Start {
            a: site.uniform("a", d_in * rank, bound),
            b: site.uniform("b", rank * d_out, (rank as f64).sqrt().recip()),
        },
        "orthogonal" => orthogonal(site),
        "olora" => olora(site),
        "pissa" => pissa(site),
        _ => Start { a: site.uniform("a", d_in * rank, bound), b: zero },
    })
}
