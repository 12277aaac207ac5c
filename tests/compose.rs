//! Compositions of adapter folders by the program: folders in, folders out, without a model.

#[path = "program.rs"]
mod program;

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use lowrank_models::adapter::compose::{COMPOSITIONS, Matrix, Source};
use lowrank_models::adapter::{AdapterConfig, Attach, Factors, each_adapter};
use lowrank_models::hub::peft::{Form, PeftFolder, PlainLora, PlainSettings, save};
use lowrank_models::hub::{ModelFolder, save as save_model};
use lowrank_models::{Llama, LlamaConfig, ids_tensor};
use program::{Workshop, refused, stderr, succeeded};

/// Values without structure, between -1 and 1.
fn noise(place: usize, seed: usize) -> f32 {
    ((place * 7919 + seed * 104_729 + 13) as f32 % 1009.0 * 0.37).sin()
}

fn matrix(shape: [usize; 2], seed: usize) -> Tensor<2> {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|place| noise(place, seed)).collect();
    Tensor::<1>::from_floats(values.as_slice(), &Device::default()).reshape(shape)
}

/// Layers of the folders: paths and `[d_in, d_out]`, as those of no model that the program runs.
const LAYERS: [(&str, [usize; 2]); 3] =
    [("encoder.0.query", [12, 10]), ("encoder.0.value", [12, 6]), ("encoder.1.query", [12, 10])];

/// Writes an adapter folder of noise.
fn write(dir: &Path, seed: usize, rank: usize, scale: f64, layers: &[(&str, [usize; 2])]) {
    std::fs::create_dir(dir).expect("a new folder");
    let mut plain = PlainLora::create(dir).expect("a folder");
    for (number, (path, [d_in, d_out])) in layers.iter().enumerate() {
        let seed = 10 * seed + 2 * number;
        let factors = Factors { a: matrix([*d_in, rank], seed), b: matrix([rank, *d_out], seed + 1), scale };
        plain.push(path, &factors).expect("a layer");
    }
    plain.finish(PlainSettings::default()).expect("a folder");
}

/// Four adapters of rank 3, one of rank 2, one of other layers.
fn shop() -> Workshop {
    let shop = Workshop::new(0);
    for (number, name) in ["one", "two", "three", "four"].iter().enumerate() {
        write(&shop.path(name), number + 1, 3, 0.5 + number as f64, &LAYERS);
    }
    write(&shop.path("narrow"), 6, 2, 1.0, &LAYERS);
    write(&shop.path("part"), 7, 3, 1.0, &LAYERS[..2]);
    shop
}

/// Updates of a folder by layer.
fn updates(dir: &Path) -> BTreeMap<String, Matrix> {
    let layers = PeftFolder::open(dir).and_then(PeftFolder::factors).unwrap_or_else(|error| panic!("{error}"));
    layers
        .map(|layer| layer.expect("a layer"))
        .map(|layer| (layer.path, Source::of("adapter", layer.factors, None).delta()))
        .collect()
}

fn near(x: &BTreeMap<String, Matrix>, y: &BTreeMap<String, Matrix>, share: f64) {
    assert_eq!(x.keys().collect::<Vec<_>>(), y.keys().collect::<Vec<_>>());
    for (path, x) in x {
        let apart = (x - &y[path]).amax();
        assert!(apart <= share * y[path].amax(), "{path}: {apart}");
    }
}

fn sum(dirs: &[(&Path, f64)]) -> BTreeMap<String, Matrix> {
    let mut all: BTreeMap<String, Matrix> = BTreeMap::new();
    for (dir, weight) in dirs {
        for (path, update) in updates(dir) {
            let update = update * *weight;
            all.entry(path).and_modify(|sum| *sum += &update).or_insert(update);
        }
    }
    all
}

#[test]
fn every_composition_writes_the_same_folder_each_time_and_reports_its_layers() {
    let shop = shop();
    for entry in COMPOSITIONS.iter().filter(|entry| !entry.makes_pool && entry.name != "orthogonal-sum") {
        let mut words = vec!["compose", "--method", entry.name, "--adapter", "one", "--adapter", "two", "--json"];
        if entry.options().get("density").is_some() {
            words.extend(["--set", "density=0.6"]);
        }
        let files = ["a", "b"].map(|out| {
            let out = format!("{}-{out}", entry.name);
            let told = succeeded(shop.run(&[&words[..], &["--out", &out]].concat())).stdout;
            let report: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
            assert_eq!(report["layers"].as_object().map(|layers| layers.len()), Some(LAYERS.len()), "{report}");
            assert_eq!(updates(&shop.path(&out)).len(), LAYERS.len());
            std::fs::read(shop.path(&out).join("adapter_model.safetensors")).expect("tensors")
        });
        assert!(files[0] == files[1], "{} gives other bits", entry.name);
    }
}

#[test]
fn weights_names_and_missing_layers_follow_the_command_line() {
    let shop = shop();
    let words = ["compose", "--method", "cat", "--adapter", "one=0.5", "--adapter", "narrow=-2", "--out", "cat"];
    let told = String::from_utf8(succeeded(shop.run(&words)).stdout).expect("text");
    assert!(told.contains("one, narrow") && told.contains("cat"), "{told}");
    let (one, narrow, part) = (shop.path("one"), shop.path("narrow"), shop.path("part"));
    near(&updates(&shop.path("cat")), &sum(&[(&one, 0.5), (&narrow, -2.0)]), 1e-6);
    let words = ["compose", "--method", "svd", "--adapter", "one", "--adapter", "part"];
    let output = shop.run(&[&words[..], &["--out", "svd"]].concat());
    refused(&output, &["adapter part has no layer encoder.1.query, which one adapts", "--allow-missing"]);
    succeeded(shop.run(&[&words[..], &["--out", "svd", "--allow-missing", "--set", "rank=6"]].concat()));
    near(&updates(&shop.path("svd")), &sum(&[(&one, 1.0), (&part, 1.0)]), 1e-5);
    // A source without the layer counts as zeros where factors are combined element by element.
    let density: &[&str] = &["--set", "density=1"];
    for (method, set) in [("linear", &[][..]), ("ties", density), ("dare", density), ("magnitude-prune", density)] {
        let words = ["compose", "--method", method, "--adapter", "one", "--adapter", "part", "--allow-missing"];
        succeeded(shop.run(&[&words[..], set, &["--out", method]].concat()));
        let (made, alone) = (updates(&shop.path(method)), updates(&one));
        let missing = |all: &BTreeMap<String, Matrix>| all["encoder.1.query"].clone();
        let apart = (missing(&made) - missing(&alone)).norm();
        assert!(apart <= 1e-5 * missing(&alone).norm(), "{method}: {apart}");
    }
    // A smaller rank by clusters of one adapter.
    succeeded(shop.run(&["compose", "--method", "lego", "--adapter", "one", "--set", "k=2", "--out", "pruned"]));
    let config = std::fs::read_to_string(shop.path("pruned/adapter_config.json")).expect("a configuration");
    assert!(config.contains("\"r\": 2"), "{config}");
}

#[test]
fn a_pool_gives_every_adapter_back_and_takes_another_one() {
    let shop = shop();
    let names = ["one", "two", "three", "four"];
    let mut words = vec!["compose", "--method", "rmm", "--set", "p=3", "--out", "pool"];
    names.iter().for_each(|name| words.extend(["--adapter", name]));
    let told = succeeded(shop.run(&words));
    assert!(stderr(&told).contains("keep them as they are, or lower p"), "{}", stderr(&told));
    for name in names {
        let out = format!("{name}-again");
        succeeded(shop.run(&["revert", "--pool", "pool", "--name", name, "--out", &out]));
        near(&updates(&shop.path(&out)), &updates(&shop.path(name)), 1e-5);
    }
    let told = String::from_utf8(succeeded(shop.run(&["inspect", "pool"])).stdout).expect("text");
    assert!(told.contains("rmm of 4 adapters") && told.contains("encoder.1.query"), "{told}");
    write(&shop.path("five"), 9, 3, 1.0, &LAYERS);
    let told =
        succeeded(shop.run(&["compose", "--pool", "pool", "--adapter", "five", "--out", "larger", "--json"])).stdout;
    let report: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
    let lost = report["layers"]["encoder.0.query"]["residual of five"].as_f64().expect("a number");
    // Three directions hold all of rank 3.
    assert!(lost < 1e-3, "{report}");
    succeeded(shop.run(&["revert", "--pool", "larger", "--name", "five", "--out", "five-again"]));
    near(&updates(&shop.path("five-again")), &updates(&shop.path("five")), 1e-5);
    succeeded(shop.run(&["revert", "--pool", "larger", "--name", "one", "--out", "one-later"]));
    let bytes = |name: &str| std::fs::read(shop.path(name).join("adapter_model.safetensors")).expect("tensors");
    assert!(bytes("one-later") == bytes("one-again"));
    // A budget and a residual.
    words.truncate(3);
    names.iter().for_each(|name| words.extend(["--adapter", name]));
    succeeded(shop.run(&[&words[..], &["--budget", "1KiB", "--out", "small"]].concat()));
    let told = String::from_utf8(succeeded(shop.run(&["inspect", "small"])).stdout).expect("text");
    assert!(told.lines().any(|line| line.contains("encoder.0.query") && line.ends_with('0')), "{told}");
    succeeded(shop.run(&[&words[..], &["--residual", "0.5", "--out", "half"]].concat()));
}

#[test]
fn bad_input_is_refused_and_leaves_nothing() {
    let shop = shop();
    let two = ["compose", "--adapter", "one", "--adapter", "two", "--out", "out"];
    let with = |more: &[&str]| shop.run(&[&two[..], more].concat());
    refused(&with(&["--method", "leggo"]), &["leggo", "did you mean \"lego\"?"]);
    refused(&with(&["--method", "lego", "--set", "kk=3"]), &["kk", "did you mean \"k\"?"]);
    refused(&with(&["--method", "lego", "--set", "k=0"]), &["k = 0", "at least 1"]);
    refused(&with(&["--method", "lego", "--set", "k=7"]), &["k = 7", "6 units"]);
    refused(&with(&["--method", "ties"]), &["density is not given"]);
    refused(&with(&["--method", "rmm", "--set", "p=2"]), &["p = 2", "at most 1", "clamp=true"]);
    refused(&with(&["--method", "rmm", "--budget", "lots"]), &["--budget lots", "8MiB"]);
    refused(&with(&["--method", "rmm", "--budget", "8B"]), &["budget = 8", "the means alone take"]);
    refused(&with(&["--method", "orthogonal-sum"]), &["adapter one, layer encoder.0.query", "no vector of the basis"]);
    refused(&with(&["--method", "cat", "--names", "a"]), &["--names has 1 names", "2 times"]);
    let run = |words: &[&str]| shop.run(&[&["compose", "--out", "out"], words].concat());
    refused(&run(&["--method", "linear", "--adapter", "one", "--adapter", "narrow"]), &["has rank 2, one has rank 3"]);
    refused(&run(&["--method", "cat", "--adapter", "one", "--adapter", "one"]), &["two adapters have the name one"]);
    refused(&run(&["--method", "cat", "--adapter", "one=nan"]), &["one=nan", "finite number"]);
    refused(&run(&["--method", "cat", "--adapter", "nowhere"]), &["nowhere"]);
    let slerp = ["--method", "slerp", "--adapter", "one=0.5", "--adapter", "two=-0.5"];
    refused(&run(&slerp), &["0.5 of one and -0.5 of two"]);
    refused(&run(&["--method", "rmm", "--adapter", "one=2", "--adapter", "two"]), &["adapter one", "has a weight"]);
    // Other sides.
    write(&shop.path("wide"), 8, 3, 1.0, &[("encoder.0.query", [14, 10]), LAYERS[1], LAYERS[2]]);
    let wide = run(&["--method", "cat", "--adapter", "one", "--adapter", "wide"]);
    refused(&wide, &["adapter wide, layer encoder.0.query", "14 inputs", "12"]);
    // A value that is not a number.
    let file = shop.path("two/adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).expect("tensors");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&file, bytes).expect("a file");
    refused(&with(&["--method", "cat"]), &["adapter two, layer", "is NaN"]);
    assert!(!shop.path("out").exists());
    // A pool whose hash does not match, an unknown name, a place that is taken.
    let words =
        ["compose", "--method", "rmm", "--adapter", "one", "--adapter", "three", "--set", "p=1", "--out", "pool"];
    succeeded(shop.run(&words));
    refused(&shop.run(&words), &["pool exists already"]);
    refused(&shop.run(&["revert", "--pool", "pool", "--name", "six", "--out", "out"]), &["six", "one, three"]);
    let add = ["compose", "--pool", "pool", "--out", "out", "--adapter"];
    refused(&shop.run(&[&add[..], &["one"]].concat()), &["holds an adapter of that name"]);
    refused(&shop.run(&[&add[..], &["narrow"]].concat()), &["adapter narrow, layer", "rank 3"]);
    refused(&shop.run(&[&add[..], &["part"]].concat()), &["encoder.1.query", "the adapter does not have it"]);
    let file = shop.path("pool/pool.safetensors");
    let mut bytes = std::fs::read(&file).expect("tensors");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).expect("a file");
    refused(
        &shop.run(&["revert", "--pool", "pool", "--name", "one", "--out", "out"]),
        &["has the hash", "pool.json says"],
    );
    assert!(!shop.path("out").exists());
    let left = std::fs::read_dir(shop.dir.path()).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let left: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with(".unfinished")).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A small model in `model`, and one whose linear weights moved by a product of rank 2 in `tuned`.
fn models(shop: &Workshop) -> Llama {
    let config = LlamaConfig {
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        ..LlamaConfig::named("llama-9m", 61).expect("a known shape")
    };
    let base = Llama::random(&config, 5, &Device::default()).expect("a model");
    std::fs::create_dir(shop.path("model")).expect("a new folder");
    save_model(&base, &Default::default(), &shop.path("model"), u64::MAX).expect("a model folder");
    base
}

fn logits(dir: &Path) -> Vec<f32> {
    let model = ModelFolder::open(dir).and_then(|folder| folder.load(&Device::default())).expect("a model");
    output(&model)
}

fn output(model: &Llama) -> Vec<f32> {
    let ids: Vec<i32> = (0..12).map(|place| place * 5 % 61).collect();
    model.logits(ids_tensor(&ids, 1, &Device::default()), None).into_data().try_into_vec().expect("f32")
}

fn largest_difference(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

/// Shapes of the model's linear layers.
fn layers_of(model: &Llama) -> Vec<(String, [usize; 2])> {
    let (_, report) = model.clone().attach(Attach::new(AdapterConfig::new("lora"))).expect("LoRA");
    report.layers.into_iter().map(|layer| (layer.place.path, layer.place.shape)).collect()
}

#[test]
fn a_composition_in_the_weights_is_the_adapter_on_the_model_and_a_fine_tune_is_a_source() {
    let shop = Workshop::new(0);
    let base = models(&shop);
    let layers = layers_of(&base);
    let named: Vec<(&str, [usize; 2])> = layers.iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
    for (name, seed) in [("one", 1), ("two", 2)] {
        write(&shop.path(name), seed, 2, 0.02, &named);
    }
    let both = ["compose", "--method", "knots", "--set", "density=0.7", "--adapter", "one", "--adapter", "two"];
    succeeded(shop.run(&[&both[..], &["--out", "adapter"]].concat()));
    succeeded(shop.run(&[&both[..], &["--model", "model", "--out", "merged"]].concat()));
    let adapted =
        PeftFolder::open(&shop.path("adapter")).and_then(|folder| folder.attach(base.clone())).expect("it fits");
    let (with, without) = (logits(&shop.path("merged")), output(&base));
    assert!(largest_difference(&with, &output(&adapted.0)) < 1e-4);
    assert!(largest_difference(&with, &without) > 1e-2);
    let output_of = shop.run(&[
        "compose",
        "--method",
        "cat",
        "--adapter",
        "one",
        "--model",
        "model",
        "--dtype",
        "f64",
        "--out",
        "x",
    ]);
    refused(&output_of, &["--dtype f64"]);
    // The whole model as a source: its difference from the base is the adapter again.
    succeeded(shop.run(&["compose", "--method", "cat", "--adapter", "one", "--model", "model", "--out", "tuned"]));
    refused(
        &shop.run(&["compose", "--method", "cat", "--adapter", "tuned", "--out", "x"]),
        &["is a whole model", "--base", "--base-rank"],
    );
    let words =
        ["compose", "--method", "cat", "--adapter", "tuned", "--base", "model", "--base-rank", "2", "--out", "back"];
    succeeded(shop.run(&words));
    near(&updates(&shop.path("back")), &updates(&shop.path("one")), 1e-3);
    let words =
        ["compose", "--method", "cat", "--adapter", "tuned", "--base", "merged", "--base-rank", "40", "--out", "more"];
    succeeded(shop.run(&words));
}

#[test]
fn adapters_with_a_dense_update_become_plain_lora_and_others_their_own_form() {
    let shop = Workshop::new(0);
    let base = models(&shop);
    for structure in ["dora", "vera", "lora-xs", "loca", "nola", "orthogonal", "block-lora"] {
        let config = AdapterConfig { seed: 3, ..AdapterConfig::new(structure) };
        let config = match structure {
            "loca" => config.with_option("n_components", 40),
            _ => config.with_rank(8),
        };
        let moved = moved(&base, &config);
        let dir = shop.path(structure);
        save(&moved, "default", Form::Own, None, &dir).expect("a folder");
        let lora = format!("{structure}-lora");
        let words = ["export", "--adapter", structure, "--model", "model", "--as", "lora", "--rank", "32", "--json"];
        let told = succeeded(shop.run(&[&words[..], &["--out", &lora]].concat())).stdout;
        let report: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
        let worst = report["residuals"].as_object().expect("layers").values().filter_map(|value| value.as_f64());
        assert!(worst.fold(0.0, f64::max) < 1e-4, "{structure}: {report}");
        let plain =
            PeftFolder::open(&shop.path(&lora)).and_then(|folder| folder.attach(base.clone())).expect("it fits").0;
        let apart = largest_difference(&output(&plain), &output(&moved));
        assert!(apart < 2e-3, "{structure}: {apart}");
        // Without the model: products, and what peft has itself.
        let alone = format!("{structure}-peft");
        let output_of = shop.run(&["export", "--adapter", structure, "--out", &alone]);
        match structure {
            "loca" => refused(&output_of, &["update"]),
            _ => {
                succeeded(output_of);
                let back = PeftFolder::open(&shop.path(&alone))
                    .and_then(|folder| folder.attach(base.clone()))
                    .expect("it fits")
                    .0;
                assert!(largest_difference(&output(&back), &output(&moved)) < 1e-4, "{structure}");
            }
        }
        let told = String::from_utf8(succeeded(shop.run(&["inspect", structure])).stdout).expect("text");
        let parts = matches!(structure, "dora" | "vera" | "loca");
        assert!(
            told.contains(if parts { "updates need the model" } else { "NORM OF THE UPDATE" }),
            "{structure}: {told}"
        );
    }
    refused(&shop.run(&["export", "--adapter", "dora", "--as", "lora", "--rank", "0", "--out", "x"]), &["--rank 0"]);
    refused(
        &shop.run(&["compose", "--method", "cat", "--adapter", "dora", "--out", "x"]),
        &["dora", "lowrank export", "--as lora"],
    );
}

/// The base with an adapter whose trained tensors moved.
fn moved(base: &Llama, config: &AdapterConfig) -> Llama {
    let (fresh, _) = base.clone().attach(Attach::new(config.clone())).expect("an adapter");
    let mut tensors = BTreeMap::new();
    each_adapter(&fresh, |path, adapter| {
        let fields = adapter.stack[0].tensors().into_iter().map(|(tensor, data)| {
            let shape = data.shape().as_slice().to_vec();
            let mut values: Vec<f32> = data.try_into_vec().expect("f32");
            use lowrank_models::adapter::TensorRole::{Frozen, Position};
            if !matches!(tensor.role, Frozen | Position) {
                values.iter_mut().enumerate().for_each(|(place, value)| *value += 0.02 * noise(place + path.len(), 1));
            }
            (tensor.field, burn::tensor::TensorData::new(values, shape))
        });
        tensors.insert(path.to_string(), fields.collect());
    });
    base.clone().attach(Attach::new(config.clone()).with_tensors(tensors)).expect("its own tensors").0
}

#[test]
fn starts_for_other_trainers_share_a_basis_and_are_summed_without_crosstalk() {
    let shop = Workshop::new(0);
    let base = models(&shop);
    for (name, seed) in [("one", "1"), ("two", "2")] {
        let concept = format!("concept={name}");
        let words =
            ["adapter-start", "--shapes", "model/model.safetensors", "--rank", "4", "--seed", seed, "--out", name];
        let more = ["--set", "registry=used.json", "--set", &concept, "--set", "basis=dct"];
        succeeded(shop.run(&[&words[..], &more].concat()));
        // The trainer changes B alone.
        let mut layers = PeftFolder::open(&shop.path(name)).and_then(PeftFolder::factors).expect("a LoRA");
        let trained = format!("{name}-trained");
        std::fs::create_dir(shop.path(&trained)).expect("a new folder");
        let mut plain = PlainLora::create(&shop.path(&trained)).expect("a folder");
        for (number, layer) in layers.by_ref().enumerate() {
            let layer = layer.expect("a layer");
            assert_eq!(layer.factors.b.clone().abs().sum().into_scalar::<f32>(), 0.0);
            let b = matrix(layer.factors.b.dims(), 30 + number + seed.len());
            plain.push(&layer.path, &Factors { b, ..layer.factors }).expect("a layer");
        }
        plain.finish(PlainSettings::default()).expect("a folder");
    }
    let words = ["compose", "--method", "orthogonal-sum", "--adapter", "one-trained", "--adapter", "two-trained"];
    let told = succeeded(shop.run(&[&words[..], &["--set", "basis=dct", "--json", "--out", "sum"]].concat())).stdout;
    let report: serde_json::Value = serde_json::from_slice(&told).expect("JSON");
    for figures in report["layers"].as_object().expect("layers").values() {
        assert!(figures["crosstalk"].as_f64().is_some_and(|value| value < 1e-6), "{report}");
    }
    let (one, two) = (shop.path("one-trained"), shop.path("two-trained"));
    near(&updates(&shop.path("sum")), &sum(&[(&one, 0.6), (&two, 0.6)]), 1e-5);
    refused(
        &shop.run(&[&words[..], &["--set", "basis=dct", "--set", "basis_seed=1", "--out", "x"]].concat()),
        &["row 0 of A is no vector of the basis dct of basis_seed 1"],
    );
    let words = ["adapter-start", "--shapes", "model", "--structure", "lora-xs", "--rank", "4", "--out", "x"];
    refused(&shop.run(&words), &["lora-xs", "start it on its model"]);
    assert_eq!(layers_of(&base).len(), updates(&shop.path("sum")).len());
}
