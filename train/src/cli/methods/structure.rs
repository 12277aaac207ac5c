//! Facts about an adapter structure in addition to those of its entry.

use lowrank_models::adapter::{Alpha, Rank, StructureEntry};

/// Names and values of the facts.
pub fn facts(name: &str) -> Vec<(String, String)> {
    let Ok(entry) = StructureEntry::find(name) else { return Vec::new() };
    let spec = entry.spec;
    let or_nothing = |text: &str| if text.is_empty() { "nothing".to_string() } else { text.to_string() };
    let rank = match spec.rank {
        Rank::Fixed(rank) => rank.to_string(),
        Rank::SmallerSide(most) => format!("the smaller side of the layer, at most {most}"),
        Rank::None => "not supported".into(),
    };
    let alpha = match spec.alpha {
        Alpha::Ranks(times) => format!("{times} times the rank"),
        Alpha::Fixed(alpha) => alpha.to_string(),
        Alpha::None => "not supported".into(),
    };
    let dropout = if spec.dropout { "from 0 to below 1" } else { "not supported" };
    let inits =
        std::iter::once("default").chain(spec.inits.iter().map(|init| init.name)).collect::<Vec<_>>().join(", ");
    let merges = spec.merges.map_or_else(|reason| format!("no: {reason}"), |()| "yes".into());
    [
        ("frozen in addition", or_nothing(spec.stores)),
        ("adapter.rank, unset", rank),
        ("adapter.alpha, unset", alpha),
        ("adapter.dropout", dropout.into()),
        ("adapter.init", inits),
        ("merges into the weight", merges),
    ]
    .map(|(name, fact)| (name.to_string(), fact))
    .to_vec()
}
