from test_all import *
import dataclasses

# --------------------------------------------------------------------------------------------------
# memdlm.py

CLOSED = MemDLMConfig(rank=4, alpha=8.0, inner_lr=0.1, clip=0, masks=4, chunk=4,
                      inner_on="closed_book")
OPEN = dataclasses.replace(CLOSED, inner_on="prompt")


def prompt_loss(model, batch, inner, x0=None, context=None, exact=False):
    """loss_prompt with the first five columns as the text to write (padding left out)."""
    if context is None:
        context = batch.attend.clone()
        context[:, 5:] = False
    return memdlm.loss_prompt(model, batch.x0 if x0 is None else x0, context, batch.given,
                              batch.attend, batch.t, batch.u, torch.ones(4), 24, inner, 7, exact)


def phi_of(monkeypatch, model, batch, x0, inner=OPEN):
    """The fast weights that loss_prompt answers with."""
    seen = []
    adapt = memdlm.adapt_to_prompt

    def spy(*inputs):
        seen.append(adapt(*inputs))
        return seen[-1]
    monkeypatch.setattr(memdlm, "adapt_to_prompt", spy)
    prompt_loss(model, batch, inner, x0, batch.given & batch.attend)
    monkeypatch.setattr(memdlm, "adapt_to_prompt", adapt)
    return seen[-1]


def test_the_phi_of_a_prompt_does_not_know_the_answer(model, batch, monkeypatch):
    other = batch.x0.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 37 + 3
    mine = phi_of(monkeypatch, model, batch, batch.x0)
    theirs = phi_of(monkeypatch, model, batch, other)
    assert all(torch.equal(mine[name].B, theirs[name].B) for name in mine)


def test_in_training_a_prompt_is_written_as_at_inference(model, batch, monkeypatch):
    trained = phi_of(monkeypatch, model, batch, batch.x0)
    prompt, pad = batch.x0[:, :8], batch.attend[:, :8]
    used = memdlm.adapt_to_prompt(model, prompt, pad, torch.ones_like(pad), OPEN, 7)
    assert all(torch.equal(trained[name].B, used[name].B) for name in used)


def test_a_batch_without_a_text_to_write_is_plain_mdlm(model, batch):
    nothing = torch.zeros_like(batch.given)
    xt, masked = corrupt(batch.x0, batch.t, batch.given, 1, batch.u)
    plain = masked_loss(model(xt, batch.attend, masked), batch.x0, masked, torch.ones(4), 24)
    assert torch.equal(prompt_loss(model, batch, CLOSED, context=nothing), plain)


def test_the_closed_book_is_closed_only_phi_knows_the_text(model, batch):
    other = batch.x0.clone()
    other[:, :5] = (other[:, :5] + 1) % 37 + 3
    still = dataclasses.replace(CLOSED, inner_lr=0.0)
    assert torch.equal(prompt_loss(model, batch, still), prompt_loss(model, batch, still, other))
    assert prompt_loss(model, batch, CLOSED) != prompt_loss(model, batch, CLOSED, other)


def test_a_hidden_text_leaves_the_canvas_that_has_only_the_question(model, batch):
    still = dataclasses.replace(CLOSED, inner_lr=0.0)
    short = batch._replace(**{name: getattr(batch, name)[:, 5:]
                              for name in ("x0", "given", "attend", "u")})
    xt, masked = corrupt(short.x0, short.t, short.given, 1, short.u)
    alone = masked_loss(model(xt, short.attend, masked), short.x0, masked, torch.ones(4), 24)
    torch.testing.assert_close(prompt_loss(model, batch, still), alone)


def test_rows_that_ask_about_one_text_share_its_phi(model, batch):
    shared = batch._replace(x0=batch.x0.clone(), attend=torch.ones_like(batch.attend))
    shared.x0[1, :5] = shared.x0[0, :5]
    shared.x0[3, :5] = shared.x0[2, :5]
    two = dataclasses.replace(CLOSED, questions=2)
    torch.testing.assert_close(prompt_loss(model, shared, two), prompt_loss(model, shared, CLOSED))


def test_the_exact_gradient_is_that_of_the_whole_bilevel_loss_and_first_order_is_not(batch):
    model = random_backbone().double().requires_grad_(True)
    p = model.layers[0].ffn.up.weight
    slopes = {}
    for exact in (True, False):
        loss = prompt_loss(model, batch, CLOSED, exact=exact)
        grad, = torch.autograd.grad(loss, p)
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).double()
        slopes[exact] = (grad * direction).sum().item()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * 1e-5 * direction
        ends.append(prompt_loss(model, batch, CLOSED).item())
        with torch.no_grad():
            p -= sign * 1e-5 * direction
    measured = (ends[0] - ends[1]) / 2e-5
    assert slopes[True] == pytest.approx(measured, rel=1e-3)
    assert abs(slopes[False] - measured) > 10 * abs(slopes[True] - measured)


@pytest.mark.parametrize("n", range(1, 13))
def test_the_pre_anchor_state_has_the_released_codes_count_and_holds_the_anchor(n):
    u = torch.rand(1, n, generator=torch.Generator().manual_seed(n))
    given = torch.zeros(1, n, dtype=torch.bool)
    for k in range(n + 1):
        anchor = bb.smallest(u, torch.tensor([k]))
        noisier = memdlm.pre_anchor(anchor, u, given, 1.5)
        assert int(noisier.sum()) == min(n, 3 * k // 2)
        assert (noisier | ~anchor).all()


def recorded_masks(model, ids, inner, monkeypatch):
    """The positions that each inner step on a prompt has for targets."""
    masks = []
    loop = memdlm.inner_loop

    def spy(backbone, phi, states, *rest):
        states = list(states)
        masks.extend(masked for _, masked, _ in states)
        return loop(backbone, phi, states, *rest)
    monkeypatch.setattr(memdlm, "inner_loop", spy)
    memdlm.adapt_to_prompt(model, ids, None, torch.ones_like(ids, dtype=torch.bool), inner)
    return masks


def test_complementary_masks_cover_every_token_once_and_leave_its_neighbours_in_view(
        model, monkeypatch):
    whole = dataclasses.replace(CLOSED, chunk=0)
    masks = torch.stack(recorded_masks(model, torch.randint(3, 40, (2, 21)), whole, monkeypatch))
    assert (masks.sum(0) == 1).all()
    for distance in (1, 2, 3):
        assert not (masks[..., distance:] & masks[..., :-distance]).any()


@pytest.mark.parametrize("inner", [CLOSED, dataclasses.replace(CLOSED, masks=0)])
def test_a_text_written_in_chunks_gives_a_row_the_same_phi_alone_and_in_a_padded_batch(
        model, batch, inner):
    together = adapted(model, batch, inner)
    for row in range(4):
        pads = int((~batch.attend[row]).sum())
        x0, prompt = batch.x0[row:row + 1, pads:], batch.given[row:row + 1, pads:]
        alone = memdlm.adapt_to_prompt(model, x0, None, prompt, inner)
        for name in alone:
            torch.testing.assert_close(together[name].B[row], alone[name].B[0], atol=1e-5,
                                       rtol=1e-3)


def test_two_prompts_have_two_random_starts_and_one_prompt_always_the_same(model):
    ids = torch.randint(3, 40, (2, 9))
    prompt = torch.ones_like(ids, dtype=torch.bool)
    phi = memdlm.init_phi(model, memdlm.row_seeds(ids, prompt, 0), MEM)
    again = memdlm.init_phi(model, memdlm.row_seeds(ids.flip(0), prompt, 0), MEM)
    for name, w in phi.items():
        assert not torch.equal(w.A[0], w.A[1])
        assert torch.equal(w.A[0], again[name].A[1])


def test_exposure_bias_carries_the_memory_of_the_sequential_run(model, batch):
    seen = []

    def counting(backbone, xt, attend, start):
        def predict(xt, t, state, at):
            seen.append(state)
            return backbone(xt, attend, at), state + 1
        return predict, 0
    memdlm.exposure_bias(model, batch.x0, batch.given, batch.attend, 3, counting)
    # static, clean and sequential start from the same state; only the last one is carried on
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_leaky_arm_is_the_inner_loop_of_training(model, batch):
    phi, _, ctx, masked = memdlm.adapt_to_response(
        model, batch.x0, batch.given, batch.attend, batch.t, batch.u, MEM, 7)
    xt = batch.x0.masked_fill(masked, 1)
    loss = masked_loss(model(xt, batch.attend, masked, phi), batch.x0, masked, torch.ones(4), 24)
    trained = memdlm.loss_memdlm(model, batch.x0, batch.given, batch.attend, batch.t, batch.u,
                                 torch.ones(4), 24, MEM, 7)
    torch.testing.assert_close(loss, trained)


# --------------------------------------------------------------------------------------------------
# metastate.py

@pytest.mark.parametrize("concentration", [0.05, 0.3, 1.0, 100.0])
def test_reveals_share_out_all_tokens_over_exactly_k_steps(concentration):
    settings = MetaStateConfig(unroll=4, concentration=concentration)
    n = torch.tensor([6, 1, 40, 0])
    reveals = metastate.draw_reveals(n, settings, seed=3)
    assert reveals.shape == (4, 4) and torch.equal(reveals.sum(1), n)
    assert torch.equal(reveals, metastate.draw_reveals(n, settings, seed=3))


def test_a_small_concentration_leaves_the_canvas_unchanged_for_most_of_the_steps():
    n = torch.full((500,), 6)
    idle = {c: (metastate.draw_reveals(n, MetaStateConfig(concentration=c), 0) == 0).float().mean()
            for c in (0.1, 100.0)}
    assert idle[0.1] > 0.6 and idle[100.0] < 0.25


def test_slots_that_are_read_before_they_are_injected_are_refused():
    with pytest.raises(ValueError, match="read before they are first injected"):
        MetaStateConfig(inject_layers=(2,), read_layer=0).check(3)
    MetaStateConfig(inject_layers=(2,), read_layer=1).check(3)


def test_the_unrolled_loss_equals_the_published_formula_row_by_row(model, batch):
    """sum over k of n_k / N_m [lambda mean over the masked + (1 - lambda) mean over the revealed]."""
    meta = trained_meta(model, balance=0.3)
    reveals = torch.tensor([[1, 2, 3], [0, 0, 6], [6, 0, 0], [2, 4, 0]])
    whole = metastate.loss_unrolled(meta, model, batch.x0, batch.given, batch.attend, batch.u,
                                    reveals, 4)
    total = 0.0
    for b in range(4):
        pads = int((~batch.attend[b]).sum())
        x = batch.x0[b:b + 1, pads:]
        order = (8 - pads + batch.u[b, 8:].argsort()).tolist()
        slots = None
        for n_k in reveals[b].tolist():
            if not order:
                break
            masked = torch.zeros_like(x, dtype=torch.bool)
            masked[0, order] = True
            xt = x.masked_fill(masked, 1)
            t = torch.tensor([len(order) / 6])
            logits, slots, _ = meta.step(model, model.context(xt), xt, t, slots, masked, 8 - pads)
            ce = F.cross_entropy(logits, x[masked], reduction="none")
            places = masked[0].nonzero()[:, 0].tolist()
            now = [places.index(i) for i in order[:n_k]]
            order = order[n_k:]
            if n_k:
                total += n_k / 6 * (0.3 * ce.mean() + 0.7 * ce[now].mean()) / 4
    torch.testing.assert_close(whole, total, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# niah.py: the closed book

def closed_samples(n=6):
    return niah.make_samples([niah.facts], 40, n, 0, "eval")


def test_a_text_of_facts_asked_several_times_keeps_its_text_and_has_the_right_answers():
    text = closed_samples(1)[0]
    asked = niah.ask(text, 4, random.Random(0))
    for sample in asked:
        key = sample.question.split()[1]
        assert sample.context == text.context
        assert f"{key} = {sample.answer} ." in text.context


def test_the_controls_of_the_closed_book_are_what_they_are_called():
    model, tokenizer = load_backbone("tiny", "cpu"), load_tokenizer("tiny")
    samples = closed_samples()
    phi = {arm: niah.write_texts(model, tokenizer, samples, arm, CLOSED)
           for arm in niah.CLOSED_ARMS}
    assert phi["none"] is None and phi["open"] is None
    for name, w in phi["blind"].items():
        assert torch.equal(phi["other"][name].B[1:], w.B[:-1])
        torch.testing.assert_close(phi["random"][name].B.norm(dim=(1, 2)), w.B.norm(dim=(1, 2)))
        assert not torch.equal(phi["uncovered"][name].B, w.B)
        assert not torch.equal(phi["phi"][name].B, w.B)


def test_the_closed_book_writes_a_row_a_text_and_an_open_one_sees_it(tmp_path):
    model, tokenizer = load_backbone("tiny", "cpu"), load_tokenizer("tiny")
    out = tmp_path / "rows.jsonl"
    rows = niah.closed_book(model, tokenizer, CLOSED, ["none", "blind"], [2, 4], [0, 40], 3, 0, out)
    assert len(rows) == 2 * 2 * 2 * 3 == len(out.read_text().splitlines())
    assert {"arm", "facts", "length", "recall"} <= json.loads(out.read_text().splitlines()[0]).keys()
    table = niah.closed_table(rows).splitlines()
    assert len(table) == 5 and table[0].split()[-3:] == ["1", "/", "facts"]
