// The table of claims: sorted, searched and filtered by DataTables; without a script it is a plain table.
document.addEventListener('DOMContentLoaded', () => {
  const table = new DataTable('#claims', {
    pageLength: 25, order: [], autoWidth: false, columnDefs: [{ targets: [1, 2], visible: false }],
    layout: { topStart: 'info', topEnd: 'search', bottomStart: 'pageLength', bottomEnd: 'paging' },
    language: { info: '_START_ to _END_ of _TOTAL_ rows', infoEmpty: 'no row', infoFiltered: '(of _MAX_)', lengthMenu: '_MENU_ rows a page' },
  })
  for (const select of document.querySelectorAll('.filters select')) {
    const column = table.column(+select.dataset.column)
    select.addEventListener('change', () => column.search(select.value ? cell => cell === select.value : '').draw())
  }
  const follow = () => {                                        // to the row that the address names, whatever page it is on
    const id = decodeURIComponent(location.hash.slice(1)), nodes = table.rows({ search: 'applied' }).nodes().toArray()
    const place = nodes.findIndex(row => row.id === id)
    if (place < 0) return
    table.page(Math.floor(place / table.page.len())).draw('page')
    nodes[place].scrollIntoView({ block: 'center' })
    for (const row of nodes) row.classList.toggle('named', row.id === id)
  }
  window.addEventListener('hashchange', follow)
  follow()
})
