//! Combinations of adapter folders by `peft`, made again from their sources.

use std::path::{Path, PathBuf};

use lowrank_models::ModelError;
use lowrank_models::adapter::compose::{Composition, Source};
use lowrank_models::hub::compose::{AdapterSource, Options, Outcome, Sources};
use lowrank_models::hub::peft::{PeftFolder, PlainLora};
use serde_json::{Map, Value, json};

use super::case::Case;

fn fail(error: ModelError) -> String {
    error.to_string()
}

/// Composes the sources that a case names and compares the updates with those of the folder that `peft` made. Returns the folder of the result.
pub fn reproduced(case: &Case, folder: &Path, into: &Path) -> Result<PathBuf, String> {
    let asked = &case.config["combine"];
    let list = |key: &str| asked[key].as_array().ok_or_else(|| format!("combine.{key} is {}", asked[key]));
    let weights: Option<Vec<f64>> = list("weights")?.iter().map(Value::as_f64).collect();
    let weights = weights.ok_or("combine.weights are no numbers")?;
    let mut sources = Vec::new();
    for (name, weight) in list("adapters")?.iter().zip(weights) {
        let name = name.as_str().ok_or("combine.adapters are no names")?;
        sources.push(AdapterSource::adapter(name, &folder.with_file_name(name), Some(weight)).map_err(fail)?);
    }
    let (method, options) = method(asked)?;
    let mut method = <dyn Composition>::named(method, &options).map_err(|error| error.to_string())?;
    let mut sources = Sources::new(sources, false).map_err(fail)?;
    let settings = sources.settings();
    let mut expected = PeftFolder::open(folder).and_then(PeftFolder::factors).map_err(fail)?;
    let (mut plain, mut apart) = (PlainLora::create(into).map_err(fail)?, None);
    let composed = sources.compose(&mut *method, Options::default(), |layer| {
        let Outcome::Factors(factors) = layer.outcome else { unreachable!("factors were asked for") };
        let ours = Source::of("ours", (*factors).clone(), None).delta();
        match expected.layer(&layer.path)? {
            Some(theirs) => {
                let theirs = Source::of("peft", theirs.factors, None).delta();
                let most = (&ours - &theirs).amax() / theirs.amax().max(1e-12);
                if most > 1e-5 {
                    apart.get_or_insert(format!("{}: the update is {most:.1e} of its largest entry away", layer.path));
                }
            }
            None => drop(apart.get_or_insert(format!("peft has no layer {}", layer.path))),
        }
        plain.push(&layer.path, &factors)
    });
    composed.map_err(fail)?;
    if let Some(place) = expected.layers().next() {
        return Err(format!("peft has {} too", place.path));
    }
    plain.finish(settings).map_err(fail)?;
    apart.map_or(Ok(into.to_path_buf()), Err)
}

/// Our name and options of a combination.
fn method(asked: &Value) -> Result<(&'static str, Map<String, Value>), String> {
    let kind = asked["combination_type"].as_str().ok_or("combine.combination_type is no text")?;
    let (kind, space) = match kind.strip_suffix("_svd") {
        Some(kind) => (kind, Some("deltas")),
        None => (kind, None),
    };
    let name = match kind {
        "linear" if space.is_none() => "linear",
        "cat" => "cat",
        "svd" => "svd",
        "ties" => "ties",
        "magnitude_prune" => "magnitude-prune",
        other => return Err(format!("combination {other} is not reproduced")),
    };
    let mut options = Map::new();
    for (key, value) in asked.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let ours = match key.as_str() {
            "adapters" | "weights" | "combination_type" => continue,
            "density" => "density",
            "svd_rank" => "rank",
            "svd_clamp" => "clamp",
            "majority_sign_method" => "election",
            other => return Err(format!("combine.{other} is not known")),
        };
        options.insert(ours.to_string(), value.clone());
    }
    if let Some(space) = space {
        options.insert("space".into(), json!(space));
    }
    Ok((name, options))
}
