//! Alignment of embeddings by the program, and penalties of a run.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

use program::{Workshop, metrics, refused, succeeded};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

const CLASSES: usize = 5;

/// A pseudo-random number from -1 to 1 for every place.
fn noise(place: usize) -> f32 {
    let mixed = (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// Items around the centre of their class.
fn items(count: usize, width: usize, spread: f32) -> Vec<f32> {
    let value = |item: usize, axis: usize| {
        let centre = noise(10_000 + item % CLASSES * 97 + axis);
        centre + spread * noise(item * width + axis)
    };
    (0..count * width).map(|place| value(place / width, place % width)).collect()
}

fn save(path: &Path, values: &[f32], width: usize, labels: Option<&[i64]>) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let labels: Option<Vec<u8>> = labels.map(|labels| labels.iter().flat_map(|label| label.to_le_bytes()).collect());
    let shape = vec![values.len() / width, width];
    let mut tensors = BTreeMap::from([("embeddings", TensorView::new(Dtype::F32, shape.clone(), &bytes).unwrap())]);
    if let Some(labels) = &labels {
        tensors.insert("labels", TensorView::new(Dtype::I64, vec![labels.len() / 8], labels).unwrap());
    }
    std::fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

/// Old embeddings, and new ones that are turned in two planes and better separated.
fn pair(shop: &Workshop, count: usize) {
    let labels: Vec<i64> = (0..count).map(|item| (item % CLASSES) as i64).collect();
    save(&shop.path("old.safetensors"), &items(count, 4, 0.6), 4, Some(&labels));
    let (sine, cosine) = 1.1f32.sin_cos();
    let turned: Vec<f32> = items(count, 4, 0.2)
        .chunks(4)
        .flat_map(|h| {
            let turn = |a: f32, b: f32| [cosine * a - sine * b, sine * a + cosine * b];
            [turn(h[0], h[2]), turn(h[1], h[3])].concat()
        })
        .collect();
    save(&shop.path("new.safetensors"), &turned, 4, Some(&labels));
}

fn align(shop: &Workshop, out: &str, more: &[&str]) -> Value {
    let mut args = vec!["align", "--old", "old.safetensors", "--new", "new.safetensors", "--out", out, "--json"];
    args.extend(["--quiet", "--epochs", "60", "--batch", "50", "--lr", "0.02"]);
    args.extend(more);
    serde_json::from_slice(&succeeded(shop.run(&args)).stdout).unwrap()
}

fn weight(shop: &Workshop, out: &str) -> Vec<f32> {
    let bytes = std::fs::read(shop.path(out).join("map.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("backward.weight").unwrap();
    assert_eq!(view.shape(), [4, 4]);
    view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Distance of the rows from orthonormal ones.
fn defect(weight: &[f32]) -> f64 {
    let product =
        |i: usize, j: usize| (0..4).map(|k| f64::from(weight[i * 4 + k]) * f64::from(weight[j * 4 + k])).sum::<f64>();
    let entry = |i: usize, j: usize| product(i, j) - f64::from(u8::from(i == j));
    (0..16).map(|place| entry(place / 4, place % 4).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn new_embeddings_find_old_ones_after_the_alignment() {
    let shop = Workshop::new(0);
    pair(&shop, 150);
    let report = align(&shop, "map", &["--lambda", "1"]);
    let of = |name: &str| report["retrieval"][name]["top_1"].as_f64().unwrap();
    // Chance is a fifth.
    assert!(of("mapped new in old") > 0.7, "{report:#}");
    let curve: Vec<f64> =
        report["backfilling"]["curve"].as_array().unwrap().iter().map(|point| point.as_f64().unwrap()).collect();
    assert_eq!(curve.len(), 11);
    assert_eq!(curve[10], of("mapped new in mapped new"));
    assert_eq!(curve[0], of("mapped new in mapped old"));
    let written: Value = serde_json::from_slice(&std::fs::read(shop.path("map/report.json")).unwrap()).unwrap();
    assert_eq!(written, report);
    let ours = report["defect"].as_f64().unwrap();
    assert!((defect(&weight(&shop, "map")) - ours).abs() < 1e-4 * (1.0 + ours));
    // The same bits again.
    align(&shop, "again", &["--lambda", "1"]);
    assert_eq!(weight(&shop, "map"), weight(&shop, "again"));
}

#[test]
fn the_defect_ends_near_lambda_and_rotations_have_none() {
    let shop = Workshop::new(0);
    pair(&shop, 150);
    let free = align(&shop, "free", &["--lambda", "inf"])["defect"].as_f64().unwrap();
    assert!(free > 0.3, "{free}");
    let [loose, tight] =
        ["0.25", "0"].map(|lambda| align(&shop, lambda, &["--lambda", lambda])["defect"].as_f64().unwrap());
    assert!(tight < loose && loose < free, "{tight} {loose} {free}");
    align(&shop, "strict", &["--map", "rotation"]);
    assert!(defect(&weight(&shop, "strict")) < 1e-5);
}

#[test]
fn files_and_numbers_that_do_not_fit_are_refused() {
    let shop = Workshop::new(0);
    pair(&shop, 20);
    let run = |more: &[&str]| {
        let mut args = vec!["align", "--old", "old.safetensors", "--new", "new.safetensors", "--out", "map"];
        args.extend(more);
        let output = shop.run(&args);
        assert!(!shop.path("map").exists());
        output
    };
    refused(&run(&["--lambda=-1"]), &["--lambda -1", "at least 0"]);
    refused(&run(&["--lr", "0"]), &["--lr 0", "greater than 0"]);
    refused(&run(&["--temperature", "nan"]), &["--temperature NaN", "greater than 0"]);
    save(&shop.path("new.safetensors"), &items(19, 4, 0.1), 4, None);
    refused(&run(&[]), &["20 embeddings", "has 19", "same items"]);
    save(&shop.path("new.safetensors"), &items(20, 4, 0.1), 4, Some(&[3; 20]));
    refused(&run(&[]), &["item 0", "label 0", "and 3"]);
    let mut values = items(20, 4, 0.1);
    values[9] = f32::NAN;
    save(&shop.path("new.safetensors"), &values, 4, None);
    refused(&run(&[]), &["new.safetensors", "item 2", "not finite"]);
    std::fs::write(shop.path("new.safetensors"), b"no file of tensors").unwrap();
    refused(&run(&[]), &["new.safetensors"]);
    refused(&run(&["--test-old", "old.safetensors"]), &["--test-new"]);
}

/// Runs on the factors of an adapter, and on a matrix by its name.
#[test]
fn a_penalty_enters_the_loss_resumes_and_refuses_what_it_does_not_find() {
    let shop = Workshop::with_model(20);
    let penalty = ["--set", "penalty.name=lambda-orthogonality", "--set", "penalty.options.lambda=0"];
    let more = |out: &'static str, set: &[&'static str]| -> Vec<String> {
        let args = shop.tuned(out, &[&["--rank", "2", "--steps", "6", "--set", "checkpoint.every=3"], set].concat());
        args.into_iter().map(String::from).collect()
    };
    let run = |args: &[String]| shop.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let losses =
        |out: &str| -> Vec<f64> { metrics(&shop.path(out)).iter().filter_map(|line| line["loss"].as_f64()).collect() };
    succeeded(run(&more("plain", &[])));
    succeeded(run(&more("pulled", &penalty)));
    assert_ne!(losses("plain").last(), losses("pulled").last());
    // Half of the run, then the other half.
    succeeded(run(&more("halves", &penalty)));
    std::fs::remove_dir_all(shop.path("halves/checkpoints/step-000006")).unwrap();
    succeeded(shop.run(&["finetune", "--quiet", "--resume", "--out", "halves"]));
    let adapter = |out: &str| std::fs::read(shop.path(out).join("checkpoints/step-000006/adapter_model.safetensors"));
    assert_eq!(adapter("pulled").unwrap(), adapter("halves").unwrap());
    assert_ne!(adapter("pulled").unwrap(), adapter("plain").unwrap());

    let unknown = [&penalty[..], &["--set", "penalty.matrices=q_proj.weight"]].concat();
    refused(&run(&more("none", &unknown)), &["penalty.matrices", "q_proj.weight", "adapter-a"]);
    refused(&run(&more("none", &["--set", "penalty.name=lambda"])), &["penalty.name", "lambda-orthogonality"]);
    let negative = [&penalty[..2], &["--set", "penalty.options.lambda=-1"]].concat();
    refused(&run(&more("none", &negative)), &["penalty.options.lambda", "-1"]);
    // By name, in a pretraining.
    let by_name = [&penalty[..], &["--steps", "2", "--set", "penalty.matrices=q_proj.weight"]].concat();
    succeeded(shop.run(&shop.tiny("named", &by_name)));
}
