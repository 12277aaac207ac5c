//! Adapter folders of every type that is read, written by `peft`: logits, merged logits, positions, weights of a mixture; and written back.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use lowrank_models::adapter::{FourierFt, TrainedBiases, each_adapter, merged};
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::peft::{Form, PeftFolder, XLora, save};
use lowrank_models::{Llama, ModelError, ids_tensor};

use super::interop_peft::written_back;
use super::support::case::{Case, Outcome, host};
use super::support::combine;

const TOLERANCE: f64 = 1e-4;

fn fail(error: ModelError) -> String {
    error.to_string()
}

/// The folder of a case on top of its model.
pub fn run(case: &Case) -> Outcome {
    match case.word("kind")? {
        "peft" => {}
        other => return Err(format!("kind {other}")),
    }
    let beside = |name: &str| -> Result<PathBuf, String> { Ok(case.path.with_file_name(case.word(name)?)) };
    let (model, folder) = (beside("model")?, beside("folder")?);
    let device = Device::default();
    let ids = case.array("input_ids")?;
    let ids = || ids_tensor(&ids.i32(), ids.shape[0], &device);
    let load = || ModelFolder::open(&model).and_then(|folder| folder.load(&device)).map_err(fail);
    let logits = |model: &Llama| host(model.logits(ids(), None));
    let base = logits(&load()?);
    case.array("base_logits")?.near("base_logits", &base, TOLERANCE, 0.0)?;
    if case.word("peft_type")? == "XLORA" {
        let mixture = XLora::open(&folder, load()?).map_err(fail)?;
        case.array("scalings")?.near("scalings", &host(mixture.scalings(ids())), TOLERANCE, 0.0)?;
        let worst = case.array("logits")?.near("logits", &host(mixture.logits(ids())), TOLERANCE, 0.0)?;
        let plain = PeftFolder::open(&folder).map(|_| ()).map_err(fail).err().ok_or("opened as one adapter")?;
        return match plain.contains("XLORA") {
            true => Ok(format!("mixture of {} layers, logits {worst:.1e} away", mixture.layers().len())),
            false => Err(plain),
        };
    }
    let open = || PeftFolder::open(&folder).map_err(fail);
    let warnings = open()?.warnings;
    let (model, report) = open()?.attach(load()?).map_err(fail)?;
    let worst = case.array("logits")?.near("logits", &logits(&model), TOLERANCE, 0.0)?;
    positions(case, &model)?;
    let config = report.control.config();
    let alone = config.modules_to_save.is_empty() && config.token_rows.is_empty() && config.bias == TrainedBiases::None;
    report.control.switch(false);
    if alone && logits(&model) != base {
        return Err("switched off, the logits are not those of the base".into());
    }
    report.control.switch(true);
    let again = tempfile::tempdir().map_err(|error| error.to_string())?;
    for form in [Form::Peft, Form::Own] {
        save(&model, "default", form, None, again.path()).map_err(fail)?;
        let base = load()?;
        let (back, _) = PeftFolder::open(again.path()).and_then(|folder| folder.attach(base)).map_err(fail)?;
        case.array("logits")?.near(&format!("logits of the folder in {form:?}"), &logits(&back), TOLERANCE, 0.0)?;
    }
    if keeps_names(case, &folder)? {
        written_back(&model, &folder)?;
    }
    if case.has("merged_logits") {
        let model = merged(model).map_err(|error| error.to_string())?;
        case.array("merged_logits")?.near("merged_logits", &logits(&model), TOLERANCE, 0.0)?;
    }
    let mut again = "";
    if case.config["combine"].is_object() {
        let made = tempfile::tempdir().map_err(|error| error.to_string())?;
        let made = combine::reproduced(case, &folder, made.path()).and_then(|dir| {
            let base = load()?;
            let (ours, _) = PeftFolder::open(&dir).and_then(|folder| folder.attach(base)).map_err(fail)?;
            case.array("logits")?.near("logits of the same combination", &logits(&ours), TOLERANCE, 0.0)
        });
        made?;
        again = ", made again from its sources";
    }
    Ok(format!("logits {worst:.1e} away{again}; warnings: {warnings:?}"))
}

/// Positions of coefficients that follow from a seed.
fn positions(case: &Case, model: &Llama) -> Result<(), String> {
    let mut outcome = Ok(());
    each_adapter(model, |path, adapter| {
        let name = format!("indices.{path}");
        let Some(fourier) = adapter.stack[0].structure.downcast_ref::<FourierFt>().filter(|_| case.has(&name)) else {
            return;
        };
        let ours: Vec<f32> =
            (0..2).flat_map(|side| fourier.positions().iter().map(move |at| at[side] as f32)).collect();
        let near = case.array(&name).and_then(|expected| expected.near(&name, &ours, 0.0, 0.0));
        outcome = std::mem::replace(&mut outcome, Ok(())).and(near.map(|_| ()));
    });
    let asked = case.names().iter().filter(|name| name.starts_with("indices.")).count();
    let mut met = 0;
    each_adapter(model, |path, _| met += usize::from(case.has(&format!("indices.{path}"))));
    if met == asked { outcome } else { Err(format!("positions of {asked} layers, {met} are adapted")) }
}

/// Returns true if a folder is written with the very tensors that it has: not where it was folded, or has copies of base weights.
fn keeps_names(case: &Case, folder: &Path) -> Result<bool, String> {
    let file = Case::read(&folder.join("adapter_model.safetensors"))?;
    Ok(case.word("peft_type")? != "ADALORA" && !file.names().iter().any(|name| name.ends_with(".base_layer.weight")))
}
