// Sorts and filters the documents, and says which tables are wider than the screen. The page reads
// the same without it.
(() => {
  const hint = () => {
    for (const each of document.querySelectorAll(".scroll"))
      each.classList.toggle("overflows", each.scrollWidth > each.clientWidth + 1);
  };
  addEventListener("resize", hint);
  document.addEventListener("toggle", hint, true); // a table that was folded away has no width
  hint();
  const list = document.getElementById("windows");
  const tools = document.getElementById("tools");
  if (!list || !tools) return;
  const [sort, split, outcome, find] = ["sort", "split", "outcome", "find"].map((id) => document.getElementById(id));
  const count = document.getElementById("count");
  const items = [...list.children].map((node, rank) => ({
    node,
    rank,
    split: node.dataset.s,
    name: node.querySelector(".name").textContent.toLowerCase(),
    r: node.dataset.r.split(" ").map(Number),
    d: node.dataset.d.split(" ").map(Number),
    p: node.dataset.p.split(" ").map((ln) => (ln === "-inf" ? -Number.MAX_VALUE : Number(ln))),
    e: node.dataset.e.split(" "),
    g: node.dataset.g.split(" "),
  }));
  function apply(event) {
    const [by, audit, sign] = sort.value.split(" ");
    const key = (item) => (by === "rank" ? item.rank : item[by][audit] * sign);
    const last = (value) => (Number.isNaN(value) ? Infinity : value); // absent from that audit
    items.sort((a, b) => last(key(a)) - last(key(b)) || a.rank - b.rank);
    const [wanted, of] = outcome.value.split(" ");
    const outcomes = wanted === "0" ? "02" : wanted;
    const words = find.value.toLowerCase();
    let shown = 0;
    for (const item of items) {
      const fits =
        (!split.value || item.split === split.value) &&
        (!wanted || (wanted === "3" ? item.g[of] === "1" : outcomes.includes(item.e[of]))) &&
        item.name.includes(words);
      item.node.hidden = !fits;
      shown += fits;
    }
    if (event) list.append(...items.map((item) => item.node)); // not on opening, when they are in order
    count.textContent = `${shown} of ${items.length} shown`;
  }
  for (const control of [sort, split, outcome]) control.addEventListener("change", apply);
  find.addEventListener("input", apply);
  document.getElementById("toggle").addEventListener("click", () => {
    const seen = items.filter((item) => !item.node.hidden);
    const open = seen.some((item) => !item.node.open);
    for (const item of seen) item.node.open = open;
  });
  tools.hidden = false;
  apply();
})();
