//! A structure of another crate: made known by its name, attached, trained, saved, resumed and merged, and changed in size in the middle of a run.

use burn::module::{Module, Param, ParamGroup};
use burn::optim::{GradientsParams, ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Device, Tensor};
use lowrank_models::adapter::{
    AdapterConfig, AdapterError, Alpha, Attach, Base, Factors, Input, Method, PassInfo, Penalty, PenaltyAt, Place,
    Rank, Resize, Scaling, Site, Spec, Structure, StructureEntry, TensorRole, TensorSpec, Totals, adapters_of,
    each_adapter, merged, penalty, register, resize,
};
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::{Llama, LlamaConfig, ids_tensor};
use lowrank_optim::AdamWConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `y = x W + b + scale ((x A) * g) B`: every component has a gate, whose magnitude a penalty pulls to 0.
#[derive(Module, Debug)]
struct Gated {
    /// `[d_in, rank]`.
    a: Param<Tensor<2>>,
    /// `[rank]`.
    gate: Param<Tensor<1>>,
    /// `[rank, d_out]`.
    b: Param<Tensor<2>>,
    #[module(skip)]
    scale: f64,
    #[module(skip)]
    pull: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
struct GatedOptions {
    /// Strength of the penalty.
    #[schemars(range(min = 0.0))]
    pull: f64,
}

impl Default for GatedOptions {
    fn default() -> Self {
        Self { pull: 1e-2 }
    }
}

impl Structure for Gated {
    fn factors(&self) -> Option<Factors> {
        let there = self.gate.dims()[0] > 0;
        let b = || self.b.val() * self.gate.val().unsqueeze_dim(1);
        there.then(|| Factors { a: self.a.val(), b: b(), scale: self.scale })
    }

    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        // The leading components alone, where the step says so.
        let rank = self.gate.dims()[0];
        let used = input.pass.values.get("components").map_or(rank, |used| rank.min(*used as usize));
        match self.factors().filter(|_| used > 0) {
            Some(Factors { a, b, scale }) => {
                base.plus_product(input, a.narrow(1, 0, used), b.narrow(0, 0, used), scale)
            }
            None => base.forward(input.x),
        }
    }

    fn penalty(&self, base: &Base<'_>, totals: &Totals) -> Option<Penalty> {
        let [d_in, _] = base.shape();
        assert_eq!(d_in, self.a.dims()[0]);
        let share = self.pull / totals.ranks as f64;
        let pulls = self.gate.dims()[0] > 0;
        pulls.then(|| Penalty { at: PenaltyAt::Loss, value: self.gate.val().abs().sum().mul_scalar(share) })
    }
}

impl Method for Gated {
    type Options = GatedOptions;

    const SPEC: Spec = Spec {
        name: "foreign-gates",
        title: "A structure of another crate",
        arxiv: "",
        summary: "a gate for every component",
        trains: "r (d_in + d_out + 1)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(4),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "gate", role: TensorRole::Vector, transposed: false },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &GatedOptions, _place: &Place) -> Result<(), String> {
        Ok(())
    }

    fn build(options: &GatedOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        Ok(Self {
            a: site.trained("a", [d_in, rank], |site| Ok(site.normal("a", d_in * rank, 0.1)))?,
            gate: site.trained("gate", [rank], |_| Ok(vec![1.0; rank]))?,
            b: site.trained("b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?,
            scale: site.place.scale,
            pull: options.pull,
        })
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let appended = rank - keep.len();
        let draws = |site: &mut Site<'_>| site.normal(&format!("a.{rank}"), d_in * appended, 0.1);
        Ok(Self {
            a: site.resized(&self.a, [d_in, rank], 1, keep, draws),
            gate: site.resized(&self.gate, [rank], 0, keep, |_| vec![1.0; appended]),
            b: site.resized(&self.b, [rank, d_out], 0, keep, |_| vec![0.0; appended * d_out]),
            ..self.clone()
        })
    }
}

static GATED: StructureEntry = StructureEntry::of::<Gated>();

fn base() -> Llama {
    let config = LlamaConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        initializer_range: 0.2,
        ..LlamaConfig::named("llama-9m", 61).expect("a known shape")
    };
    Llama::random(&config, 5, &Device::default().autodiff()).expect("a model")
}

fn attached() -> Llama {
    register(&GATED).expect("a new name");
    base().attach(Attach::new(AdapterConfig::new("foreign-gates").with_rank(3))).expect("an adapter").0
}

/// A run: a model, its optimizer and the number of steps taken.
struct Run {
    model: Llama,
    optimizer: ModuleOptimizer,
    step: u64,
}

impl Run {
    fn new() -> Self {
        Self { model: attached(), optimizer: AdamWConfig::new().init(), step: 0 }
    }

    fn advance(mut self, steps: u64) -> Self {
        for _ in 0..steps {
            let ids = |shift: u64| -> Vec<i32> {
                (0..14).map(|i| ((i * i + 5 * (i + shift) + 3 * self.step) % 61) as i32).collect()
            };
            let device = Device::default();
            for control in adapters_of(&self.model) {
                control.set_pass(PassInfo::training(self.step, None));
            }
            let loss = self.model.loss_sum(ids_tensor(&ids(0), 2, &device), ids_tensor(&ids(1), 2, &device), None);
            let loss = loss.div_scalar(14.0) + penalty(&self.model, PenaltyAt::Loss).expect("a penalty");
            let grads = GradientsParams::from_grads(loss.backward(), &self.model);
            self.model = self.optimizer.step(1e-2, self.model, grads);
            self.step += 1;
        }
        self
    }

    /// Changes components as a method would: one more on the query layers, the first one less on the first of the down projections, none left on
    /// the second.
    fn resize(mut self) -> Self {
        let states = self.optimizer.to_record().len();
        let (model, changed) = resize(self.model, "default", |path, adapter| {
            let rank = adapter.place().rank;
            match path {
                path if path.ends_with("q_proj") => Some(Resize { keep: (0..rank).collect(), append: 1 }),
                "model.layers.0.mlp.down_proj" => Some(Resize { keep: (1..rank).collect(), append: 0 }),
                "model.layers.1.mlp.down_proj" => Some(Resize { keep: Vec::new(), append: 0 }),
                _ => None,
            }
        })
        .expect("components that can change");
        // The second time there is nothing left on the last down projection.
        assert_eq!(changed.len(), if self.step == 3 { 4 * 3 } else { 3 * 3 });
        self.model = model;
        self.optimizer =
            self.optimizer.with_group(ParamGroup::from_ids(changed.clone()), AdamWConfig::new().build(), None);
        // Two moments and the number of its steps for each; those of the other tensors stay.
        assert_eq!(states - self.optimizer.to_record().len(), 2 * changed.len());
        self
    }

    /// The run as another process finds it.
    fn resumed(self) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        save(&self.model, "default", Form::Own, None, dir.path()).expect("a folder that can be written");
        let state = self.optimizer.to_record().into_bytes().expect("a record").to_vec();
        let record = OptimizerRecord::from_bytes(Bytes::from_bytes_vec(state)).expect("the same record");
        let folder = PeftFolder::open(dir.path()).expect("a folder that was written");
        let (model, _) = folder.attach(base()).expect("an adapter of this model");
        Self { model, optimizer: AdamWConfig::new().init().load_record(record), step: self.step }
    }

    fn logits(&self) -> Vec<f32> {
        let ids: Vec<i32> = (0..22).map(|i| (i * i * 7 + 3) % 61).collect();
        let model = self.model.valid();
        model.logits(ids_tensor(&ids, 2, &Device::default()), None).into_data().try_into_vec().expect("f32")
    }

    fn bits(&self) -> Vec<u32> {
        self.logits().into_iter().map(f32::to_bits).collect()
    }

    fn ranks(&self) -> Vec<(String, usize)> {
        let mut ranks = Vec::new();
        each_adapter(&self.model, |path, adapter| ranks.push((path.to_string(), adapter.stack[0].place().rank)));
        ranks
    }
}

#[test]
fn a_foreign_structure_is_trained_saved_resumed_and_merged() {
    let fresh = Run::new();
    let start = fresh.bits();
    assert_eq!(Run { model: base(), ..Run::new() }.bits(), start, "it starts at the base");
    let whole = fresh.advance(6);
    assert_ne!(whole.bits(), start);
    let parts = Run::new().advance(3).resumed().advance(3);
    assert_eq!(parts.bits(), whole.bits());
    let expected = whole.logits();
    let merged = Run { model: merged(whole.model).expect("a product merges"), ..Run::new() }.logits();
    let largest = expected.iter().fold(0f32, |most, value| most.max(value.abs()));
    assert!(expected.iter().zip(&merged).all(|(a, b)| (a - b).abs() < 1e-4 * largest));
}

#[test]
fn a_name_that_is_taken_is_refused() {
    register(&GATED).expect("a new name");
    register(&GATED).expect("the same once more");
    static OTHER: StructureEntry = StructureEntry::of::<Gated>();
    assert!(register(&OTHER).expect_err("a second of the name").to_string().contains("foreign-gates is taken"));
    assert_eq!(StructureEntry::find("foreign-gates").expect("a known name").spec.title, Gated::SPEC.title);
    let unknown = StructureEntry::find("foreign-gate").expect_err("no such name").to_string();
    assert!(unknown.contains("did you mean \"foreign-gates\"?") && unknown.contains("lora"), "{unknown}");
    let config = AdapterConfig::new("foreign-gates").with_option("pull", -1.0);
    let error = base().attach(Attach::new(config)).map(|_| ()).expect_err("a value that is checked").to_string();
    assert!(error.contains("adapter.options.pull = -1") && error.contains("at least 0"), "{error}");
}

#[test]
fn components_change_in_the_middle_of_a_run_that_may_stop_anywhere() {
    let whole = Run::new().advance(3).resize().advance(3).resize().advance(2);
    let rank = |path: &str| whole.ranks().into_iter().find(|(known, _)| known == path).expect("an adapted layer").1;
    assert_eq!(rank("model.layers.1.self_attn.q_proj"), 5);
    assert_eq!(rank("model.layers.0.mlp.down_proj"), 1);
    assert_eq!(rank("model.layers.1.mlp.down_proj"), 0);
    assert_eq!(rank("model.layers.1.mlp.up_proj"), 3);
    let stops: [fn() -> Run; 4] = [
        || Run::new().advance(2).resumed().advance(1).resize().advance(3).resize().advance(2),
        || Run::new().advance(3).resumed().resize().advance(3).resize().advance(2),
        || Run::new().advance(3).resize().resumed().advance(3).resize().resumed().advance(2),
        || Run::new().advance(3).resize().advance(1).resumed().advance(2).resize().advance(1).resumed().advance(1),
    ];
    for stopped in stops.map(|run| run()) {
        assert_eq!(stopped.ranks(), whole.ranks());
        assert_eq!(stopped.bits(), whole.bits());
    }
    // The scale of a layer stays what it was.
    each_adapter(&whole.model, |path, adapter| assert_eq!(adapter.stack[0].place().scale, 1.0, "{path}"));
}

#[test]
fn components_that_do_not_exist_and_structures_of_a_fixed_size_are_refused() {
    let of = |keep: Vec<usize>| {
        let keep = move |_: &str, _: &lowrank_models::adapter::Adapter| Some(Resize { keep: keep.clone(), append: 0 });
        resize(attached(), "default", keep).map(|_| ()).expect_err("components that are not there").to_string()
    };
    assert!(of(vec![0, 3]).contains("there are 3") && of(vec![1, 1]).contains("at most"));
    let shrink = |_: &str, _: &lowrank_models::adapter::Adapter| Some(Resize { keep: vec![0], append: 0 });
    let error = resize(attached(), "other", shrink).map(|_| ()).expect_err("another name").to_string();
    assert!(error.contains("no adapter \"other\""), "{error}");
    let (fixed, _) = base().attach(Attach::new(AdapterConfig::new("sorsa").with_rank(3))).expect("an adapter");
    let error = resize(fixed, "default", shrink).map(|_| ()).expect_err("a fixed size").to_string();
    assert!(error.contains("sorsa has a fixed size"), "{error}");
}

#[test]
fn the_values_of_a_step_reach_the_layers() {
    let run = Run::new().advance(3);
    let all = run.bits();
    let with = |components: f64| {
        let values = [("components".to_string(), components)].into();
        let pass = PassInfo { values, ..PassInfo::default() };
        adapters_of(&run.model).into_iter().for_each(|control| control.set_pass(pass.clone()));
        run.bits()
    };
    assert_eq!(with(3.0), all);
    assert_ne!(with(1.0), all);
    assert_eq!(with(0.0), Run { model: base(), ..Run::new() }.bits());
}
