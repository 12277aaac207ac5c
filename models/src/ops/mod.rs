//! temp
use burn::tensor::{Int, Tensor, Device, TensorData, activation};
/// ignore
pub const IGNORE: i32 = -100;
/// r
pub fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    let ms = x.clone().square().mean_dim(D-1).add_scalar(eps).sqrt().recip();
    x * ms * gamma.unsqueeze()
}
/// s
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> { activation::silu(gate) * up }
/// r
#[derive(Clone, Debug)]
pub struct Rotary { cos: Tensor<2>, sin: Tensor<2> }
impl Rotary {
    /// n
    pub fn new(head_dim: usize, positions: usize, theta: f64, device: &Device) -> Self {
        let half = head_dim/2;
        let mut c = Vec::new(); let mut s = Vec::new();
        for p in 0..positions { for i in 0..half { let a = p as f64 / theta.powf(2.0*i as f64/head_dim as f64); c.push(a.cos() as f32); s.push(a.sin() as f32);} }
        let device = device.clone().inner();
        Self { cos: Tensor::from_data(TensorData::new(c,[positions,half]), &device), sin: Tensor::from_data(TensorData::new(s,[positions,half]), &device) }
    }
}
/// r
pub fn rotary(x: Tensor<4>, table: &Rotary, offset: usize) -> Tensor<4> {
    let [_,t,_,d] = x.dims(); let h = d/2;
    let cos = table.cos.clone().slice([offset..offset+t]).reshape([1,t,1,h]);
    let sin = table.sin.clone().slice([offset..offset+t]).reshape([1,t,1,h]);
    let a = x.clone().narrow(3,0,h); let b = x.narrow(3,h,h);
    Tensor::cat(vec![a.clone()*cos.clone() - b.clone()*sin.clone(), b*cos + a*sin], 3)
}
/// c
pub fn causal_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Option<Tensor<2, Int>>) -> Tensor<4> {
    let [b,t,h,d] = q.dims(); let [_,s,kv,_] = k.dims();
    let rep = |x: Tensor<4>| x.unsqueeze_dim::<5>(3).expand([b,s,kv,h/kv,d]).reshape([b,s,h,d]).swap_dims(1,2);
    let (k,v) = (rep(k), rep(v));
    let scores = q.swap_dims(1,2).matmul(k.swap_dims(2,3)).mul_scalar(1.0/(d as f64).sqrt());
    let dev = scores.device();
    let rows: Tensor<2, Int> = Tensor::<1,Int>::arange((s-t) as i64..s as i64, &dev).reshape([t,1]);
    let cols: Tensor<2, Int> = Tensor::<1,Int>::arange(0..s as i64, &dev).reshape([1,s]);
    let mut mask = cols.clone().expand([t,s]).greater(rows.expand([t,s])).reshape([1,1,t,s]).expand([b,h,t,s]);
    if let Some(st) = starts {
        let m2 = cols.reshape([1,1,s]).expand([b,t,s]).lower(st.reshape([b,t,1]).expand([b,t,s])).reshape([b,1,t,s]).expand([b,h,t,s]);
        mask = mask.bool_or(m2);
    }
    activation::softmax(scores.mask_fill(mask, -1e30), 3).matmul(v).swap_dims(1,2)
}
/// l
pub fn linear_cross_entropy(x: Tensor<2>, weight: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logp = activation::log_softmax(x.matmul(weight), 1);
    let keep = targets.clone().not_equal_elem(IGNORE);
    let safe = targets.clone().mask_fill(targets.equal_elem(IGNORE), 0);
    let picked = logp.gather(1, safe.unsqueeze_dim(1)).squeeze_dim::<1>(1);
    (picked * keep.float()).sum().neg()
}
/// e
pub fn embedding(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    let [b,t] = ids.dims(); let d = weight.dims()[1];
    weight.select(0, ids.reshape([b*t])).reshape([b,t,d])
}
