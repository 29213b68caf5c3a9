// Collects an instruction set's micro-kernels into its table; included last, inside its namespace.

template <class Step>
constexpr ElementKernels<typename Step::Element> element_kernels() {
  return {.panel_product = panel_product<Step>,
          .store_gated = store_gated<Step>,
          .rms_norm = rms_norm<Step>,
          .rotate_head = rotate_head<Step>,
          .round_row = round_row<Step>,
          .page_scores = page_scores<Step>,
          .chunk_softmax = chunk_softmax<Step>,
          .page_values = page_values<Step>,
          .divide = divide<Step>,
          .pack_columns = pack_columns<Step>};
}

constexpr KernelTable make_table(Isa isa) {
  return {.isa = isa,
          .bf16 = element_kernels<PairStep>(),
          .f32 = element_kernels<SingleStep>(),
          .widen_pairs = widen_pairs,
          .widen_panel = widen_panel,
          .store_plain = store_plain,
          .store_residual = store_residual,
          .merge_chunk = merge_chunk,
          .panel_stats = panel_stats,
          .merge_panels = merge_panels,
          .compare_panel = compare_panel,
          .panel_mass = panel_mass,
          .share_from = share_from,
          .all_finite = all_finite,
          .shifted_exp = shifted_exp};
}
